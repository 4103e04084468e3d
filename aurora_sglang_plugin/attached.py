"""What Aurora adds to a worker of SGLang's, whatever its steps are: capture, hot swap, the control
of what drafts, and that an operator's calls leave the draft alone. Mixed in before the worker.
"""

from __future__ import annotations

import logging
import secrets
import socket
from typing import Any

from sglang.srt.distributed import get_tp_group
from sglang.srt.mem_cache import common
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel

from aurora_sglang_plugin.config import load_server_config
from aurora_sglang_plugin.drafts.kinds import feature_layers
from aurora_sglang_plugin.link.publisher import Publisher
from aurora_sglang_plugin.metrics_thread import ServerMetrics
from aurora_sglang_plugin.serve.audit import Audit
from aurora_sglang_plugin.serve.capture import Capture
from aurora_sglang_plugin.serve.control import Control
from aurora_sglang_plugin.serve.speculation import Speculation
from aurora_sglang_plugin.serve.staging import reserve_staging_memory
from aurora_sglang_plugin.serve.swap import Reloader
from aurora_sglang_plugin.serve.target_updates import DraftUpdater, TargetUpdater
from aurora_sglang_plugin.weights.manifest import target_fingerprint

logger = logging.getLogger(__name__)

# Who hands an operator's calls to the model runners.
UPDATES = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

# of this process; the release hook has no other way to find them
_capture: Capture | None = None
_audit: Audit | None = None


def on_release(req: Any) -> None:
    """Called by the hook on SGLang's release_kv_cache: the one place that every end of a request
    passes.
    """
    if _capture is not None:
        _capture.ended(req)
    if _audit is not None:
        _audit.ended(req)


class Attached:
    """Mixed in before a worker of SGLang's, whose methods it calls with `super()`."""

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
    # whether the server was started with one, and whether that drafts before a version came
    _has_draft = _drafts_at_start = True
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
            has_draft=self._drafts_at_start, writes=tp.rank_in_group == 0,
            wait_s=config.plugin.canary.waits(
                # the same on every node of a server
                args.dist_init_addr or f"{socket.gethostname()}:{args.port}"
            ),
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
                layers=feature_layers(model),
            )
            _capture = self.capture
        if config.plugin.audit.share and tp.rank_in_group == 0:
            self._start_audit(config.plugin.audit.share, get_parallel().dp_rank)
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

    def _start_audit(self, share: float, replica: int | None) -> None:
        global _audit
        args = self.server_args
        cause = (
            "draft steps are fixed" if self._speculation is None
            else "this server's HTTP is encrypted" if args.ssl_certfile
            # the scheduler would compute with memory that was given back
            else "its memory may be given back (--enable-memory-saver)" if args.enable_memory_saver
            else None
        )  # fmt: skip
        if cause is not None:
            logger.warning("aurora audits nothing: %s", cause)
            return
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", None: "127.0.0.1"}.get(args.host, args.host)
        url = f"http://[{host}]:{args.port}" if ":" in host else f"http://{host}:{args.port}"
        self.control.audit = _audit = Audit(share, url, args.api_key, replica)
        _audit.start()

    def prewarm_sampling(self) -> Any:
        """SGLang calls it after the capture of graphs, before anything is served."""
        result = super().prewarm_sampling()  # type: ignore[misc]
        if self.capture is not None:
            target = self.target_worker.model_config
            self.capture.prewarm(target.vocab_size, target.dtype)
        return result

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
        if self.control.audit is not None:
            self.control.audit.forget()
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
