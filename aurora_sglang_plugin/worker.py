"""The seam: SGLang's EAGLE worker, which also tells the capture what it sees and swaps the draft
between two steps.

One decode step, in SGLang's order, with ours marked:

  > control.begin    how many steps this round drafts; none is plain decoding
    draft            levels 1..S of every tree (level 1 was proposed by the previous step's
                     draft-extend)
    verify           the target's forward, sampling (which edits the logits in place), acceptance,
                     compaction
    on_publish       the lengths, which the scheduler needs to prepare the next step: nothing of
                     ours stands before them
  > swap             every tree of the next step, level 1 included, comes from one version
  > capture.verify   trees, accepted path, features, the logits that judged
    draft-extend     writes the draft's KV for the accepted path, proposes level 1
  > control.judged   rounds later, when the accepted lengths are on the host
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.eagle_utils import _eagle_prefill_tail_tokens
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

from aurora_sglang_plugin.attached import Attached
from aurora_sglang_plugin.config import load_server_config
from aurora_sglang_plugin.drafts.kinds import UNTRAINED, any_target_ids
from aurora_sglang_plugin.serve.speculation import Speculation
from aurora_sglang_plugin.serve.stopwatch import Stopwatch
from aurora_sglang_plugin.serve.worth import COLD
from aurora_sglang_plugin.server_args import NO_DRAFT

logger = logging.getLogger(__name__)


class AuroraWorker(Attached, EAGLEWorkerV2):
    """EAGLEWorkerV2 with capture, hot swap and a count of draft steps that follows what pays.
    Without them it is EAGLE3, step for step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # whether SGLang is yet to publish lengths in this round, and what is to be done after that
        self._publishes = False
        self._after_publish: Callable[[], None] | None = None
        self._has_draft = get_spec().speculative_draft_load_format != NO_DRAFT
        if self.adaptive_controller is not None:
            config = load_server_config().plugin.speculation
            self._drafts_at_start = self._has_draft and not self._untrained()
            self._speculation = Speculation(config, self._most_steps, self._drafts_at_start)
            self.adaptive_controller.params = self._speculation
            self._stopwatch = Stopwatch(torch.device(self.device))

    def alloc_memory_pool(self, *args: Any, **kwargs: Any) -> None:
        draft = self._draft_worker
        if draft is not None and not self._has_draft:
            # Weights that were made up have no target ids: the first version brings them.
            model = draft.draft_runner.model
            model.hot_token_id = any_target_ids(model, self.target_worker.model_config.vocab_size)
        super().alloc_memory_pool(*args, **kwargs)

    def _untrained(self) -> bool:
        """Whether the draft says of itself that nobody trained it."""
        draft = self._draft_worker
        config = draft.draft_runner.model_config.hf_config if draft is not None else None
        untrained = getattr(config, UNTRAINED, False) is True
        if untrained:
            logger.info("aurora draft is untrained: plain decoding until a version is worth it")
        return untrained

    def _target_ids(self) -> Any:
        return self._draft_worker.hot_token_id

    def forward_batch_generation(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        control = self.control
        if control is not None:
            if batch.forward_mode.is_idle():
                control.idle()
            elif batch.forward_mode.is_extend() or batch.is_extend_in_batch:
                control.prefill(batch.reqs)
            else:
                control.begin(batch.reqs)
        on_publish = kwargs.get("on_publish")
        self._publishes, self._after_publish = on_publish is not None, None
        if on_publish is not None:
            kwargs["on_publish"] = partial(self._publish, on_publish)
        return super().forward_batch_generation(batch, *args, **kwargs)

    def _publish(self, on_publish: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        on_publish(*args, **kwargs)
        self._publishes = False
        if self._after_publish is not None:
            self._after_publish()
            # it holds the step's tensors
            self._after_publish = None

    def activate_step_by_batch(self, batch_size: int) -> None:
        super().activate_step_by_batch(batch_size)
        if self._speculation is not None:
            # read by SGLang in this round
            skip = envs.SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND
            if skip.get() != (cold := self._speculation.steps == COLD):
                skip.set(cold)

    def verify(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        # an SGLang whose scheduler does not allocate through the worker
        if self.reloader is None:
            self._attach()
        idle = batch.forward_mode.is_idle()
        tree = batch.spec_info
        if self.capture is not None and not idle:
            self.capture.before_verify(batch)
        result = super().verify(batch, *args, **kwargs)
        after = partial(self._verified, None if idle else batch, tree, result)
        if self._publishes:
            self._after_publish = after
        else:
            after()
        return result

    def _verified(self, batch: Any | None, tree: Any, result: Any) -> None:
        """Between verify and the draft's extend; every rank counts every step, idle or not."""
        drafted_by = self.reloader.version
        if batch is not None:
            self.control.verified(batch.reqs, self.speculative_num_steps)
        self.control.step()
        self.reloader.step()
        if batch is not None and self.capture is not None:
            self.capture.verify(batch, tree, result, drafted_by, self.reloader.version)

    def on_verify_complete_cpu(self, accepted: list[int], batch_size: int = 0) -> None:
        """Called for each verify step in their order, when its accepted drafts are known."""
        if self.control is not None:
            self.control.judged(accepted, batch_size)

    def _forward_prefill_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        # the draft's extend rebinds it to the rotated ids
        input_ids = batch.input_ids
        draft = self._draft_worker
        if draft is not None and self._speculation is not None:
            cold = self._speculation.cold and not batch.forward_mode.is_idle()
            draft._draft_extend_for_prefill = (
                self._no_draft_extend_for_prefill if cold else self._timed_draft_extend_for_prefill
            )
        result = super()._forward_prefill_batch(batch, *args, **kwargs)
        if self.capture is not None and not batch.forward_mode.is_idle():
            self.capture.prefill(batch, input_ids, result, self.reloader.version)
        return result

    def _timed_draft_extend_for_prefill(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """SGLang's, and how long the device takes for it; nothing waits for the answer."""
        draft, stopwatch = self._draft_worker, self._stopwatch
        stopwatch.start(sum(batch.extend_lens) if batch.extend_lens else 0)
        result = type(draft)._draft_extend_for_prefill(draft, batch, *args, **kwargs)
        stopwatch.stop()
        for tokens, seconds in stopwatch.finished():
            self._speculation.prefilled(tokens, seconds)
        return result

    def _no_draft_extend_for_prefill(
        self, batch: Any, hidden: torch.Tensor, next_tokens: torch.Tensor, *_: Any, **__: Any
    ) -> Any:
        """What the draft's extend leaves behind, without its pass over the prompt."""
        self._speculation.prefilled(sum(batch.extend_lens), None)
        ends = torch.tensor(batch.extend_lens).cumsum(0).to(batch.input_ids.device) - 1
        batch.input_ids = batch.input_ids.roll(-1)
        batch.input_ids[ends] = _eagle_prefill_tail_tokens(batch, next_tokens).to(
            batch.input_ids.dtype
        )
        output = SimpleNamespace(
            next_draft_input=EagleDraftInput(
                bonus_tokens=next_tokens, num_tokens_per_req=1, num_tokens_for_logprob_per_req=1
            )
        )
        self._stub_skipped_draft_extend(batch, output)
        return output.next_draft_input
