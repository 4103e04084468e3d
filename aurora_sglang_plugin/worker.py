"""The seam: SGLang's EAGLE worker, which also tells the capture what it sees and swaps the draft
between two steps.

One decode step, in SGLang's order, with ours marked:

  > control.begin    how many steps this round drafts; none is plain decoding
    draft            levels 1..S of every tree (level 1 was proposed by the previous step's
                     draft-extend)
    verify           the target's forward, sampling (which edits the logits in place), acceptance,
                     compaction
  > swap             every tree of the next step, level 1 included, comes from one version
  > capture.verify   trees, accepted path, features, the logits that judged
    draft-extend     writes the draft's KV for the accepted path, proposes level 1
  > control.judged   rounds later, when the accepted lengths are on the host
"""

from __future__ import annotations

import logging
import secrets
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.environ import envs
from sglang.srt.mem_cache import common
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel, get_spec
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.eagle_utils import _eagle_prefill_tail_tokens
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

from aurora_sglang_plugin.config import load_server_config
from aurora_sglang_plugin.drafts.kinds import any_target_ids
from aurora_sglang_plugin.link.publisher import Publisher
from aurora_sglang_plugin.metrics_thread import ServerMetrics
from aurora_sglang_plugin.serve.capture import Capture
from aurora_sglang_plugin.serve.control import Control
from aurora_sglang_plugin.serve.speculation import Speculation
from aurora_sglang_plugin.serve.staging import reserve_staging_memory
from aurora_sglang_plugin.serve.stopwatch import Stopwatch
from aurora_sglang_plugin.serve.swap import Reloader
from aurora_sglang_plugin.serve.target_updates import DraftUpdater, TargetUpdater
from aurora_sglang_plugin.serve.worth import COLD
from aurora_sglang_plugin.server_args import NO_DRAFT
from aurora_sglang_plugin.weights.manifest import target_fingerprint

logger = logging.getLogger(__name__)

# Who hands an operator's calls to the model runners.
UPDATES = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

# of this process; the release hook has no other way to find it
_capture: Capture | None = None


def on_release(req: Any) -> None:
    """Called by the hook on SGLang's release_kv_cache: the one place that every end of a request
    passes.
    """
    if _capture is not None:
        _capture.ended(req)


class Attached:
    """What Aurora adds to a worker of SGLang's, whatever its steps are; mixed in before it."""

    # SGLang's: once it is made
    server_args: Any
    target_worker: Any
    _draft_worker: Any
    speculative_num_steps: int
    topk: int
    # on the first tensor-parallel rank
    capture: Capture | None = None
    # once attached
    reloader: Reloader | None = None
    control: Control | None = None
    # whether the server was started with one
    _has_draft = True
    # if the count of draft steps may change
    _speculation: Speculation | None = None
    # fingerprint of the target as it is now
    target = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most_steps = self.speculative_num_steps
        # SGLang sizes its KV cache by what is free, after this and before _attach: hold the room of
        # what is made there.
        self._room = (
            reserve_staging_memory(self._draft_worker.draft_runner.model)
            if self._draft_worker is not None
            else None
        )

    def alloc_memory_pool(self, *args: Any, **kwargs: Any) -> None:
        super().alloc_memory_pool(*args, **kwargs)  # type: ignore[misc]
        # The draft is complete now (the line above set its head and its target ids) and
        # nothing was served yet.
        self._attach()

    def _attach(self) -> None:
        global _capture
        config = load_server_config()
        args = self.server_args
        target = self.target = target_fingerprint(args.model_path, args.revision)
        draft = self._draft_worker
        # a pipeline stage that hosts no draft verifies nothing
        if draft is None:
            return
        _check_hook()
        tp, model = get_tp_group(), draft.draft_runner.model
        group = tp.cpu_group if tp.world_size > 1 else None
        self._room = None
        self.reloader = Reloader(
            model, self._target_ids(), config.weights, config.plugin.swap, target, group,
            has_draft=self._has_draft, writes=tp.rank_in_group == 0,
        )  # fmt: skip
        self.control = Control(
            config.plugin, self._most_steps, self.reloader, self._speculation,
            decides=tp.rank_in_group == 0,
        )  # fmt: skip
        self.reloader.apply_at_start()
        self._mark_new_requests()
        if config.plugin.capture.enabled and tp.rank_in_group == 0:
            publisher = Publisher(config.link, config.plugin.publish, target)
            device = next(model.parameters()).device
            self.capture = Capture(
                config.plugin.capture,
                publisher,
                device,
                self._most_steps,
                self.topk,
                rejection=bool(self.server_args.speculative_use_rejection_sampling),
            )
            _capture = self.capture
        self._keep_the_draft(draft.draft_runner)
        ranks = dict(tp_rank=tp.rank_in_group, dp_rank=get_parallel().dp_rank or 0)
        ServerMetrics(self.capture, self.reloader, self.control, **ranks).start()
        logger.info(
            "aurora attached capture=%s endpoint=%s weights=%s draft_version=%d target=%s",
            self.capture is not None,
            config.link.endpoint,
            config.weights.directory,
            self.reloader.version,
            target,
        )

    def _mark_new_requests(self) -> None:
        from sglang.srt.managers.scheduler import Scheduler

        def made(req: Any, *args: Any, **kwargs: Any) -> None:
            self.reloader.renewal.mark(req)

        name = "_create_generation_req"
        if not hasattr(Scheduler, name):
            logger.warning("aurora cannot renew cached prefixes in this SGLang")
            return
        scheduler = f"{Scheduler.__module__}.{Scheduler.__name__}"
        HookRegistry.register(f"{scheduler}.{name}", made, HookType.AFTER)
        HookRegistry.apply_hooks()

    def _keep_the_draft(self, draft: Any) -> None:
        """Weight updates of the operator reach the target alone, and Aurora hears of them."""
        target = self.target_worker.model_runner
        if not hasattr(target, "weight_updater"):
            logger.warning(
                "aurora cannot keep weight updates from its draft in this SGLang: make none"
            )
            return
        target.weight_updater = TargetUpdater(target.weight_updater, self._target_changed)
        draft.weight_updater = updater = DraftUpdater(lambda: self.reloader.version)

        def selected(runners: Any, manager: Any, selector: str = "all") -> None:
            updater.alone = selector == "draft"

        def checked(answer: Any, manager: Any, request: Any) -> None:
            if request.action == "reset_tensors":
                # The draft holds the target's embedding: whichever was reset, the target was.
                self._target_changed(None)
                self.reloader.restore()

        def resumed(answer: Any, manager: Any, request: Any) -> None:
            if request.tags and "weights" not in request.tags:
                return
            # Memory that was given back comes back without its contents, unless a copy was kept.
            args = self.server_args
            if args.enable_memory_saver and not args.enable_weights_cpu_backup:
                self._target_changed(None)
            self.reloader.restore()

        HookRegistry.register(f"{UPDATES}._select_runners", selected, HookType.AFTER)
        HookRegistry.register(f"{UPDATES}.check_weights", checked, HookType.AFTER)
        HookRegistry.register(f"{UPDATES}.resume_memory_occupation", resumed, HookType.AFTER)
        HookRegistry.apply_hooks()

    def _target_changed(self, directory: str | None) -> None:
        """The target's weights are those of `directory` now; None: of no files, like nobody
        else's.
        """
        target = secrets.token_hex(16)
        if directory is not None:
            try:
                args = self.server_args
                revision = args.revision if directory == args.model_path else None
                target = target_fingerprint(directory, revision)
            except ValueError as error:
                logger.error("aurora cannot tell which target it has error=%s", error)
        if target == self.target:
            return
        self.target = target
        self.reloader.retarget(target)
        if self.capture is not None:
            self.capture.publisher.retarget(target)
        logger.warning(
            "aurora target changed target=%s weights=%s draft_version=%d: "
            "only a trainer of this target learns from here on, and only its versions are loaded",
            target, directory, self.reloader.version,
        )  # fmt: skip

    def _target_ids(self) -> Any:
        """int64 [VD], the target id of each draft id, where the vocabulary is a reduced one."""
        return None


class AuroraWorker(Attached, EAGLEWorkerV2):
    """EAGLEWorkerV2 with capture, hot swap and a count of draft steps that follows what pays.
    Without them it is EAGLE3, step for step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._has_draft = get_spec().speculative_draft_load_format != NO_DRAFT
        if self.adaptive_controller is not None:
            config = load_server_config().plugin.speculation
            self._speculation = Speculation(config, self._most_steps, self._has_draft)
            self.adaptive_controller.params = self._speculation
            self._stopwatch = Stopwatch(torch.device(self.device))

    def alloc_memory_pool(self, *args: Any, **kwargs: Any) -> None:
        draft = self._draft_worker
        if draft is not None and not self._has_draft:
            # Weights that were made up have no target ids: the first version brings them.
            model = draft.draft_runner.model
            model.hot_token_id = any_target_ids(model, self.target_worker.model_config.vocab_size)
        super().alloc_memory_pool(*args, **kwargs)

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
        return super().forward_batch_generation(batch, *args, **kwargs)

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
        if batch.forward_mode.is_idle():
            result = super().verify(batch, *args, **kwargs)
            # every rank counts every step
            self.control.step()
            self.reloader.step()
            return result
        tree = batch.spec_info
        if self.capture is not None:
            self.capture.before_verify(batch)
        result = super().verify(batch, *args, **kwargs)
        drafted_by = self.reloader.version
        self.control.verified(batch.reqs, self.speculative_num_steps)
        self.control.step()
        self.reloader.step()
        if self.capture is not None:
            self.capture.verify(batch, tree, result, drafted_by, self.reloader.version)
        return result

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


def _check_hook() -> None:
    """SGLang only logs a hook that it could not apply; without this one no request would ever end
    for the trainer.
    """
    if not hasattr(common.release_kv_cache, "__wrapped__"):
        raise ValueError(
            "SGLang did not apply Aurora's hook on sglang.srt.mem_cache.common.release_kv_cache;"
            " expected a version that has it (tested with 0.5.23): see 'Failed to apply hooks' in"
            " this log"
        )
