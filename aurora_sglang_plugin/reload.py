"""Load new weights into a running draft: staged beside it by the watcher, swapped in by the scheduler thread.

    watcher thread     FREE -> STAGING -> READY      the twin is filled by the model's own load_weights
    scheduler thread           READY -> APPLYING -> FREE      previous <- live, live <- twin, hot_token_id

The twin is the draft module once more, with parameters of its own in the very layout of the live ones (fused qkv and
gate_up, this rank's shard), so that the swap is copies only: same addresses, CUDA graphs stay valid. A READY twin that
nobody took yet is taken back when a newer version comes, so that the newest wins. The target's embedding, which the
draft holds by reference, is shared with the twin and never written. This module imports no sglang.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from pathlib import Path

import torch
from torch import nn

from aurora_sglang_plugin.config import SwapConfig, WeightsConfig
from aurora_sglang_plugin.manifest import ManifestError
from aurora_sglang_plugin.watch import Expected, Watcher, Weights, canonical_name

log = logging.getLogger(__name__)

FREE, STAGING, READY, APPLYING = "free", "staging", "ready", "applying"
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Values of config.json that a running server cannot change; compared where a version names them.
FIXED_CONFIG = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "draft_vocab_size", "rms_norm_eps", "hidden_act", "norm_output", "norm_before_fc", "fc_norm",
    "num_aux_hidden_states", "target_hidden_size", "eagle_config",
)  # fmt: skip


class Reloader:
    """Owns the twin, the previous version's copy, and which version is live.

    `model` is SGLang's draft model, `hot_token_id` the worker's int64 [VD] or None without a reduced vocabulary,
    `target` the target's fingerprint. Raises ValueError for a draft whose weights cannot be swapped.
    """

    def __init__(
        self,
        model: nn.Module,
        hot_token_id: torch.Tensor | None,
        weights: WeightsConfig,
        swap: SwapConfig,
        target: str,
    ):
        self.version = 0  # 0: the draft that the server was started with
        self.previous_version: int | None = None
        self.swaps = 0
        self.swap_seconds_sum = 0.0
        self.swap_seconds_max = 0.0
        self._model = model
        self._hot = hot_token_id
        self._staged_hot = None if hot_token_id is None else torch.empty_like(hot_token_id)
        self._twin = make_twin(model)
        twin_parameters = dict(trainable(self._twin))
        self._pairs = [(live, twin_parameters[name]) for name, live in trainable(model)]
        self._previous: list[torch.Tensor] | None = None
        self._previous_hot: torch.Tensor | None = None
        self._state = FREE
        self._handoff = threading.Lock()  # held for a comparison and an assignment, never for a copy
        self._staged_version = 0
        device = self._pairs[0][0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staged_event = torch.cuda.Event() if self._stream else None
        self._applied_event = torch.cuda.Event() if self._stream else None
        expected = Expected(target, expected_shapes(model, hot_token_id), model.config.vocab_size, _fixed(model.config))
        self._watcher = Watcher(Path(weights.directory), swap.poll_s, expected, self.stage)
        self._enabled = swap.enabled

    def start(self) -> None:
        """Start watching. Call it after CUDA graphs were captured: staging allocates, which a capture forbids."""
        if self._enabled:
            self._watcher.start()

    def close(self) -> None:
        self._watcher.close()

    def apply_at_start(self) -> int | None:
        """Load the newest published version on this thread, before anything is served. Returns it, or None."""
        if not self._enabled:
            return None
        self._watcher.poll()
        return self.apply_pending()

    def apply_pending(self) -> int | None:
        """On the scheduler thread, between verify and draft-extend: swap in what is staged. Returns the new version.

        Never waits: where nothing is staged it costs one comparison. On CUDA the copies are queued on the current
        stream, after the staging stream's.
        """
        if self._state != READY or not self._hand_over(READY, APPLYING):
            return None
        started = time.perf_counter()
        if self._stream:
            torch.cuda.current_stream().wait_event(self._staged_event)
        live, staged = [p.data for p, _ in self._pairs], [t.data for _, t in self._pairs]
        torch._foreach_copy_(self._previous, live)
        torch._foreach_copy_(live, staged)
        if self._hot is not None:
            self._previous_hot.copy_(self._hot)
            self._hot.copy_(self._staged_hot)
        if self._stream:
            self._applied_event.record()
        self.previous_version, self.version = self.version, self._staged_version
        self._hand_over(APPLYING, FREE)
        self._measure(started)
        return self.version

    def rollback(self) -> int | None:
        """On the scheduler thread: put the previous version back. Returns it, or None where there is none."""
        if self.previous_version is None:
            return None
        started = time.perf_counter()
        torch._foreach_copy_([p.data for p, _ in self._pairs], self._previous)
        if self._hot is not None:
            self._hot.copy_(self._previous_hot)
        self.version, self.previous_version = self.previous_version, None
        self._measure(started)
        return self.version

    def stage(self, weights: Weights) -> bool:
        """On the watcher thread: fill the twin. Returns False while a swap still reads it. Raises ManifestError."""
        if not (self._hand_over(FREE, STAGING) or self._hand_over(READY, STAGING)):
            return False
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                self._fill(weights)
        except Exception:
            self._state = FREE
            raise
        self._staged_version = weights.manifest.version
        self._state = READY
        return True

    def counters(self) -> dict[str, float]:
        """For metrics: current version, swaps, their time on the scheduler thread, refusals by cause."""
        return {
            "draft_version": self.version,
            "swaps": self.swaps,
            "swap_seconds_sum": self.swap_seconds_sum,
            "swap_seconds_max": self.swap_seconds_max,
            **{f"refused_{cause}": count for cause, count in sorted(self._watcher.failures.items())},
        }

    def _fill(self, weights: Weights) -> None:
        if self._stream:
            self._stream.wait_event(self._applied_event)  # the last swap's copies may still read the twin
        if self._previous is None:
            self._previous = [torch.empty_like(p.data) for p, _ in self._pairs]
            self._previous_hot = None if self._hot is None else torch.empty_like(self._hot)
        for _, staged in self._pairs:
            staged.data.fill_(float("nan"))  # what the loader leaves out is found below
        tensors = {n: _as_torch(*t) for n, t in weights.tensors.items()}
        self._twin.load_weights([(n, t) for n, t in tensors.items() if n not in ("d2t", "t2d")])
        for name, staged in trainable(self._twin):
            if not bool(torch.isfinite(staged.data).all()):
                raise ManifestError("values", f"{name} is not whole and finite in {staged.dtype} after loading")
        if self._staged_hot is not None:
            d2t = tensors["d2t"].to(torch.int64)
            self._staged_hot.copy_(d2t + torch.arange(len(d2t)))
        if self._stream:
            self._staged_event.record(self._stream)
            self._staged_event.synchronize()  # this thread may wait; host tensors must outlive their copies

    def _hand_over(self, old: str, new: str) -> bool:
        with self._handoff:
            if self._state != old:
                return False
            self._state = new
            return True

    def _measure(self, started: float) -> None:
        seconds = time.perf_counter() - started
        self.swaps += 1
        self.swap_seconds_sum += seconds
        self.swap_seconds_max = max(self.swap_seconds_max, seconds)
        log.info("draft swapped version=%d previous=%s seconds=%.4f", self.version, self.previous_version, seconds)


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The draft's own parameters: all but the embedding, which is the target's."""
    return [(n, p) for n, p in model.named_parameters() if "embed_tokens" not in n]


def make_twin(model: nn.Module) -> nn.Module:
    """The same module tree with fresh parameters, except the embedding's; everything else is shared.

    Not a deepcopy: that would drop the parameters' attributes (SGLang's `weight_loader`), and copy process groups,
    streams and attention backends. A loader bound to a live layer is right for the twin: it writes to the parameter
    that it is given, and reads from the layer only its shard.
    """
    memo: dict[int, object] = {}

    def parameter(live: nn.Parameter | None) -> nn.Parameter | None:
        if live is not None and id(live) not in memo:
            twin = torch.Tensor._make_subclass(type(live), torch.empty_like(live.data), False)
            twin.__dict__.update(live.__dict__)
            memo[id(live)] = twin
        return None if live is None else memo[id(live)]

    def module(live: nn.Module, name: str) -> nn.Module:
        if name == "embed_tokens":
            return live
        if id(live) not in memo:
            twin = memo[id(live)] = copy.copy(live)
            twin._parameters = {n: parameter(p) for n, p in live._parameters.items()}
            twin._modules = {n: None if m is None else module(m, n) for n, m in live._modules.items()}
        return memo[id(live)]

    return module(model, "")


def expected_shapes(model: nn.Module, hot_token_id: torch.Tensor | None) -> dict[str, tuple[int, ...] | None]:
    """Canonical names and full (unsharded) shapes of a checkpoint of `model`, from its parameters and its config.

    Raises ValueError where the draft shares its head with the target, or is quantized: such weights cannot be swapped.
    """
    config = model.config
    if getattr(model, "load_lm_head_from_target", False) or getattr(config, "tie_word_embeddings", False):
        raise ValueError(
            "this draft uses the target's lm_head or ties its own to the embedding; expected a head of its own: give "
            "draft_vocab_size in its config.json and tie_word_embeddings=false"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    shapes: dict[str, tuple[int, ...] | None] = {}
    for live_name, live in trainable(model):
        name = canonical_name(live_name)
        if live.dtype not in TORCH.values():
            raise ValueError(f"draft parameter {name} is {live.dtype}; expected an unquantized draft")
        if ".qkv_proj." in name:
            for part, size in rows.items():
                shapes[name.replace("qkv_proj", f"{part}_proj")] = (size, *live.shape[1:])
        elif ".gate_up_proj." in name:
            for part in ("gate", "up"):
                shapes[name.replace("gate_up_proj", f"{part}_proj")] = (config.intermediate_size, *live.shape[1:])
        elif name.endswith("o_proj.weight"):
            shapes[name] = (live.shape[0], heads * head_dim)
        elif name.endswith("down_proj.weight"):
            shapes[name] = (live.shape[0], config.intermediate_size)
        elif name == "lm_head.weight":  # SGLang pads the rows
            shapes[name] = (config.draft_vocab_size, live.shape[1])
        else:
            shapes[name] = tuple(live.shape)
    if hot_token_id is not None:
        shapes["d2t"] = tuple(hot_token_id.shape)
    return shapes


def _fixed(config) -> dict[str, object]:
    return {k: getattr(config, k) for k in FIXED_CONFIG if getattr(config, k, None) is not None}


def _as_torch(dtype: str, array) -> torch.Tensor:
    if dtype == "BF16":
        return torch.from_numpy(array.copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
