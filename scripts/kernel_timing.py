"""Time and peak memory of one call on a device, and the row that a bench makes of it.

On a GPU: CUDA events around single calls, the median of several after a warm-up; between calls a
buffer larger than the L2 cache is overwritten, so that every call starts from memory. Peak memory
is what the call itself allocates at most.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

FLUSH_BYTES = 512 << 20
# of measuring, per row
SECONDS_EACH = 0.3


@dataclass
class Bench:
    """The rows of one run. `seconds`: nothing new is begun after that long; its rows say so."""

    device: str
    seconds: float
    rows: list[dict] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.flush = torch.empty(
            FLUSH_BYTES if self.device == "cuda" else 0, dtype=torch.uint8, device=self.device
        )

    def row(
        self, op: str, setting: str, side: str, work: float, call: Callable[[], object],
        check: Callable[[], float] | None = None, limit: float = 0.0, extra_ms: float = 0.0,
    ) -> dict:  # fmt: skip
        """Measure `call`, unless `check` (an error, at most `limit`) is red.

        Nothing that goes wrong ends the bench.

        work: FLOP or bytes of a call. extra_ms: what belongs to a call but was measured before (a
            mask).
        """
        row = self._blank(op, setting, side)
        if self.over():
            row["note"] = "skipped: out of time"
        else:
            try:
                row["error"] = None if check is None else check()
                if check is not None and not row["error"] <= limit:
                    row["note"] = f"WRONG: error {row['error']:.2g}, at most {limit:.2g} expected"
                else:
                    ms, row["peak_mib"] = self.measure(call)
                    row["ms"] = ms + extra_ms
                    row["rate"] = work / row["ms"] * 1e3 or None
                    if extra_ms:
                        row["note"], row["without_mask_ms"] = f"{ms:.3f} ms without its mask", ms
            except Exception as error:
                # a baseline that does not run is a result
                row["note"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
        if self.device == "cuda":
            torch.cuda.empty_cache()
        print(line(row), flush=True)
        return row

    def over(self) -> bool:
        return time.monotonic() - self.began > self.seconds

    def absent(self, op: str, setting: str, side: str, why: str) -> None:
        """A row of a side that cannot be tried."""
        row = self._blank(op, setting, side)
        row["note"] = why
        print(line(row), flush=True)

    def _blank(self, op: str, setting: str, side: str) -> dict:
        row = {
            "op": op,
            "setting": setting,
            "side": side,
            "ms": None,
            "rate": None,
            "peak_mib": None,
            "note": "",
        }
        self.rows.append(row)
        return row

    def measure(self, call: Callable[[], object]) -> tuple[float, float | None]:
        """(median milliseconds, peak MiB or None on a CPU)"""
        if self.device != "cuda":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3, None
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        first = self._once(call)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        times = [self._once(call) for _ in range(max(4, min(30, int(SECONDS_EACH * 1e3 / first))))]
        return statistics.median(times), peak

    def _once(self, call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


LAYOUT = "{:<22} {:<34} {:<30} {:>10} {:>9} {:>9}  {}"
HEADER = LAYOUT.format(
    "operation", "setting", "side", "ms", "T/s", "peak MiB", "(T/s: TFLOP/s; of top-K TB/s)"
)


def line(row: dict) -> str:
    def number(value: float | None, scale: float = 1.0, digits: int = 3) -> str:
        return "-" if value is None else f"{value * scale:.{digits}f}"

    return LAYOUT.format(
        row["op"], row["setting"], row["side"], number(row["ms"]), number(row["rate"], 1e-12, 2),
        number(row["peak_mib"], digits=0), row["note"],
    )  # fmt: skip


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value; NaN counts as infinite."""
    difference = (ours.double() - expected.double()).abs().max()
    error = (difference / expected.double().abs().max().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def compiled(function: Callable, device: str) -> Callable:
    """torch.compile if it is worth its time."""
    return torch.compile(function, dynamic=False) if device == "cuda" else function


def flash_only(device: str):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device == "cuda" else nullcontext()
