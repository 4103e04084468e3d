"""Losslessness, checked in production: some finished greedy requests are decoded once more without
speculation, while the server is idle, and what differs is counted.

    scheduler's thread   `ended` keeps the token ids of a share of them (few, bounded)
    audit's thread       once nothing runs: the same prompt, over the server's own HTTP; a round of
                         such a request alone is plain (control.py)

Two computations of one greedy token may differ where two logits are nearly equal, because batches
of other sizes round differently: such a difference is a `tie`, and ends the comparison. What a
request said is neither logged nor sent anywhere else.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.request
import zlib
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from aurora_sglang_plugin.serve.excluded import AUDIT, OPT_OUT, why_excluded

log = logging.getLogger(__name__)

RESULTS = ("same", "tie", "different", "interrupted", "failed")
# logprobs that differ by less are a tie: bfloat16 rounds logits of 16 to 32 to eighths
TIE = 0.25
# without a round: then the server is idle; how often that is looked at
IDLE_S, POLL_S = 1.0, 0.25
# best tokens of each position that the answer names
BEST = 8
# that wait, the newest; tokens of a prompt, and of an output that are compared
WAITING, PROMPT_TOKENS, OUTPUT_TOKENS = 4, 4096, 256
TIMEOUT_S = 120.0
NEUTRAL = {
    "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
    "min_new_tokens": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Finished:
    prompt: list[int]
    output: list[int]


class Audit:
    """`results` counts by RESULTS. `url` is the server's own, `api_key` what it asks for, `replica`
    the data-parallel one that audits."""

    def __init__(
        self, share: float, url: str, api_key: str | None = None, replica: int | None = None
    ):
        self.results: Counter[str] = Counter()
        # when the last round began (monotonic); and whether another request ran beside the one that
        # is audited, or the target was changed. Written by the scheduler's thread.
        self.round_at = time.monotonic()
        self.disturbed = False
        self._share, self._url, self._api_key, self._replica = share, url, api_key, replica
        # not by way of a proxy that the environment names
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._waiting: deque[Finished] = deque(maxlen=WAITING)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aurora-audit", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def forget(self) -> None:
        """The target is another one: what was said says nothing of it."""
        self._waiting.clear()
        self.disturbed = True

    def ended(self, req: Any) -> None:
        """A request of SGLang's gave back its KV: remember it, if it is of the share and can be
        decoded again. Never raises."""
        try:
            self._remember(req)
        except Exception as error:
            self._failed(error)

    def _remember(self, req: Any) -> None:
        if zlib.crc32(str(req.rid).encode(errors="replace")) >= self._share * 2**32:
            return
        if not _can_be_repeated(req):
            return
        length = len(req.output_ids) if req.finished_len is None else req.finished_len
        output = list(req.output_ids[: min(length, OUTPUT_TOKENS)])
        if output and len(req.origin_input_ids) <= PROMPT_TOKENS:
            self._waiting.append(Finished(list(req.origin_input_ids), output))

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            if self._waiting and time.monotonic() - self.round_at > IDLE_S:
                self.disturbed = False
                # the target may be changed at any moment, and then nothing waits
                with suppress(IndexError):
                    self.look(self._waiting.popleft())

    def look(self, finished: Finished) -> None:
        """Decode it again, and count the result."""
        try:
            result, position, gap = compare(finished.output, self._decode(finished))
        except Exception as error:
            self._failed(error)
            return
        if self.disturbed:
            result = "interrupted"
        self.results[result] += 1
        if result == "different":
            log.error(
                "aurora audit: a request's output differs from plain decoding at token=%d of %d,"
                " gap=%.3f", position, len(finished.output), gap,
            )  # fmt: skip

    def _failed(self, error: Exception) -> None:
        """An audit that fails harms nobody."""
        if not self.results["failed"]:
            log.warning("aurora audit failed (counted, logged once) error=%r", error)
        self.results["failed"] += 1

    def _decode(self, finished: Finished) -> dict[str, Any]:
        body = {
            "input_ids": finished.prompt,
            "sampling_params": {
                "temperature": 0.0,
                "max_new_tokens": len(finished.output),
                "ignore_eos": True,
                "custom_params": {AUDIT: True, OPT_OUT: False},
                **NEUTRAL,
            },
            "return_logprob": True,
            "top_logprobs_num": BEST,
            **({"routed_dp_rank": self._replica} if self._replica is not None else {}),
        }
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(
            f"{self._url}/generate", json.dumps(body).encode(), headers
        )
        with self._opener.open(request, timeout=TIMEOUT_S) as response:
            return json.loads(response.read())


def compare(output: list[int], answer: dict[str, Any]) -> tuple[str, int, float]:
    """(result, position, gap in logprob) of an output and what /generate answers, with the best
    tokens of every position. A token that is none of them is as far as the last of them, at
    least."""
    again = answer["output_ids"]
    for position, (one, other) in enumerate(zip(output, again)):
        if one == other:
            continue
        best = {
            token: logprob
            for logprob, token, *_ in answer["meta_info"]["output_top_logprobs"][position]
        }
        gap = max(best.values()) - best.get(one, min(best.values()))
        return ("tie" if gap < TIE else "different"), position, gap
    # aborted, by whoever operates the server
    if len(again) < len(output):
        return "interrupted", len(again), 0.0
    return "same", len(output), 0.0


def is_audit(req: Any) -> bool:
    custom = req.sampling_params.custom_params
    return isinstance(custom, dict) and custom.get(AUDIT) is True


def _can_be_repeated(req: Any) -> bool:
    """Greedy, finished, and of tokens alone; nobody's wish to stay out, and not an audit itself."""
    params = req.sampling_params
    return (
        req.finished()
        and req.finished_reason.to_json()["type"] in ("stop", "length")
        and params.top_k == 1
        and all(getattr(params, name, value) in (value, None) for name, value in NEUTRAL.items())
        and not params.logit_bias
        and req.grammar is None
        and not getattr(req, "custom_logit_processor", None)
        and not any(
            getattr(params, name, None)
            for name in ("json_schema", "regex", "ebnf", "structural_tag")
        )
        and not is_audit(req)
        and why_excluded(req, 1.0) is None
    )
