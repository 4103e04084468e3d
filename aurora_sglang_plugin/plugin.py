"""The entry point that SGLang calls in every one of its processes, before arguments are parsed.

It must be cheap there, whatever the algorithm: it registers the name AURORA and one hook, and
imports no worker. SGLang swallows a plugin's exceptions and serves on without it; `failure` then
says why, and so does the log. A server that was asked for AURORA fails by itself in that case
("Unknown speculative algorithm").
"""

from __future__ import annotations

import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)

# why `register` did not finish, in this process
failure: str | None = None


def register() -> None:
    """Entry point `sglang.srt.plugins`."""
    global failure
    try:
        _register()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        logger.error("aurora not registered, this process serves without it error=%r", failure)
        raise


def _register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from aurora_sglang_plugin import algorithm, cpu_engine

    if cpu_engine.install():
        from aurora_sglang_plugin.cpu_engine import sampling

        _keep_the_attention_backend_that_drafts()
        if cpu_engine.keeps_packed_weights():
            from aurora_sglang_plugin.cpu_engine import packed

            packed.register(HookRegistry, HookType)
        name = "sglang.srt.mem_cache.allocation.get_last_loc"
        HookRegistry.register(name, _last_loc, HookType.REPLACE)
        sampling.attach()
    algorithm.register()
    HookRegistry.register(
        "sglang.srt.mem_cache.common.release_kv_cache", _on_release, HookType.BEFORE
    )


def _keep_the_attention_backend_that_drafts() -> None:
    # Without AMX SGLang replaces `intel_amx` by `torch_native`, which cannot draft. The CPU engine
    # stands in for the ops of that backend; nothing else that this server runs reads the fact.
    from sglang.srt.runtime_context import override_platform

    override_platform(has_amx=True).install()


def _last_loc(*args: Any) -> Any:
    """What SGLang does for two backends only, in place of a Triton kernel: pages of KV need it."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(*args)


def _on_release(req: Any, *args: Any, **kwargs: Any) -> None:
    """Every end of a request gives its KV rows back: finished, aborted or retracted."""
    # loaded only if AURORA runs
    attached = sys.modules.get("aurora_sglang_plugin.attached")
    if attached is not None:
        attached.on_release(req)
