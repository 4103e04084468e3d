"""The name AURORA in SGLang: an algorithm that answers every question as EAGLE3 does, with a worker
of its own.

What SGLang decides by comparing the name itself is listed in docs/algorithm.md.
"""

from __future__ import annotations

import inspect
import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aurora_kernels.limits import MAX_NODES
from sglang.srt.environ import envs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from aurora_sglang_plugin.config import load_server_config
from aurora_sglang_plugin.drafts.kinds import check_draft
from aurora_sglang_plugin.link.wire import MAX_STEPS
from aurora_sglang_plugin.server_args import (
    NAME,
    has_dp_attention,
    read_as_sglang,
    record_of,
    resolve_as_eagle3,
    start_without_a_draft,
    target_config_of,
)

logger = logging.getLogger(__name__)

TESTED = "0.5.23"
OLDEST, NEWEST = (0, 5, 17), (0, 5, 23)
# The one attention backend of SGLang that drafts on the CPU.
DRAFTS_ON_CPU = "intel_amx"
# Environment variables of SGLang for benchmarks: accepted tokens, or the experts that are asked,
# are made up.
MADE_UP = (
    "SGLANG_SIMULATE_ACC_LEN",
    "SGLANG_SIMULATE_UNIFORM_EXPERTS",
    "SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS",
)
PREDICATES = ("is_", "supports_", "has_", "need_", "carries_")


class AuroraAlgorithm(CustomSpecAlgo):
    """EAGLE3 by every predicate and by ==.

    Below the class, SpeculativeAlgorithm's own methods are added to it.
    """

    def __eq__(self, other: object) -> bool:
        return other is self or other is SpeculativeAlgorithm.EAGLE3

    def __hash__(self) -> int:
        return hash(SpeculativeAlgorithm.EAGLE3)

    def handle_server_args(self, server_args: Any) -> None:
        """Check SGLang's version, the configuration and the draft, then resolve arguments as SGLang
        does for EAGLE3.

        Runs before any model is loaded. Raises ValueError.
        """
        check_sglang_version(version("sglang"))
        # the worker reads it again, minutes later: a bad file must not cost the loading
        load_server_config()
        if server_args.enable_multi_layer_eagle:
            raise ValueError(
                "AURORA drafts with a single EAGLE3 draft; start without --enable-multi-layer-eagle"
            )
        steps = getattr(server_args, "speculative_num_steps", None) or 0
        nodes = getattr(server_args, "speculative_num_draft_tokens", None) or 0
        if steps > MAX_STEPS or nodes > MAX_NODES:
            raise ValueError(
                f"AURORA's trees have at most {MAX_STEPS} steps and {MAX_NODES} nodes, this"
                f" server's {steps} and {nodes}: no trainer would take them; lower"
                " --speculative-num-steps or --speculative-num-draft-tokens"
            )
        if getattr(server_args, "enable_attn_tp_input_scattered", False):
            # SGLang switches this off for the name EAGLE3, deep in the model: scattered inputs
            # spoil aux features.
            raise ValueError(
                "AURORA reads aux hidden states; start without --enable-attn-tp-input-scattered"
            )
        record = record_of(server_args)
        has_draft = server_args.speculative_draft_model_path is not None
        if not has_draft:
            start_without_a_draft(record, server_args)
        check_options(server_args)
        check_cpu(server_args)
        if has_dp_attention(record):
            raise ValueError(
                "AURORA captures on the first rank of a tensor-parallel group; with attention data"
                " parallelism each rank has requests of its own: start without it"
            )
        draft, target_config = _draft_directory(server_args), target_config_of(record)
        for note in check_draft(draft, target_config) if has_draft else ():
            logger.warning("aurora draft directory=%s note=%r", draft, note)
        read_as_sglang(record, draft)
        check_dtype(
            server_args.dtype, json.loads((draft / "config.json").read_text()), target_config
        )
        resolve_as_eagle3(record, load_server_config().plugin.speculation, has_draft)


def register() -> None:
    """Make `--speculative-algorithm AURORA` known to this process."""

    @SpeculativeAlgorithm.register(NAME, supports_overlap=True, spec_class=AuroraAlgorithm)
    def create_worker(server_args: Any) -> type:
        from aurora_sglang_plugin.worker import AuroraWorker

        return AuroraWorker


def check_sglang_version(installed: str) -> None:
    """Raises ValueError for a version that AURORA was not written for; warns for one that it was
    not tested with.
    """
    number = tuple(int(part) if part.isdigit() else 0 for part in installed.split(".")[:3])
    if not OLDEST <= number <= NEWEST:
        span = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
        raise ValueError(
            f"AURORA works with SGLang {span} (tested with {TESTED}); this server runs {installed}"
        )
    if installed != TESTED:
        logger.warning("aurora is tested with SGLang %s, this server runs %s", TESTED, installed)


def check_options(server_args: Any) -> None:
    """Raises ValueError for options under which a draft cannot be swapped, or would learn wrong."""
    quantization = server_args.speculative_draft_model_quantization
    if quantization is not None:
        raise ValueError(
            "AURORA swaps the weights of a draft that is not quantized; SGLang would quantize it"
            f" by {quantization} (--quantization is for the draft as well): add"
            " --speculative-draft-model-quantization unquant"
        )
    if server_args.speculative_draft_window_size is not None:
        raise ValueError(
            "AURORA's trainer lets the draft attend to all tokens; "
            "start without --speculative-draft-window-size"
        )
    made_up = [name for name in MADE_UP if float(getattr(envs, name).get() or 0) > 0]
    made_up += ["--load-format dummy"] * (server_args.load_format == "dummy")
    if made_up:
        raise ValueError(
            f"{made_up[0]} makes up what the target says, and AURORA would learn it: "
            "start without it, or measure with --speculative-algorithm EAGLE3"
        )


def check_cpu(server_args: Any) -> None:
    """Raises ValueError for an attention backend that cannot draft on the CPU, at the first
    step.
    """
    if server_args.device != "cpu":
        return
    base = server_args.attention_backend
    backends = {
        "--prefill-attention-backend": server_args.prefill_attention_backend or base,
        "--decode-attention-backend": server_args.decode_attention_backend or base,
        "--speculative-draft-attention-backend": server_args.speculative_draft_attention_backend,
    }
    for option, backend in backends.items():
        if backend not in (None, DRAFTS_ON_CPU):
            raise ValueError(
                f"attention backend {backend} cannot draft on the CPU; expected {DRAFTS_ON_CPU}: "
                f"start without {option} (or --attention-backend) {backend}"
            )


def check_dtype(
    requested: str, draft_config: dict[str, Any], target_config: dict[str, Any]
) -> None:
    """Raises ValueError where `--dtype auto` would give draft and target different dtypes: the
    draft reads the target's embedding and features as they are, so that SGLang fails in its first
    forward."""

    def resolved(config: dict[str, Any]) -> str | None:
        found = config.get("dtype") or config.get("torch_dtype")
        name = None if found is None else str(found).removeprefix("torch.")
        # SGLang's choice
        return "float16" if name == "float32" else name

    draft, target = resolved(draft_config), resolved(target_config)
    if requested == "auto" and None not in (draft, target) and draft != target:
        raise ValueError(
            f"--dtype auto makes the target {target} and this draft {draft}; expected the same of"
            f" both: start with --dtype {target}, or make the draft with `aurora-trainer init-draft"
            f" --dtype {target}`"
        )


def _as_eagle3(name: str) -> Any:
    def predicate(self: AuroraAlgorithm) -> bool:
        return getattr(SpeculativeAlgorithm.EAGLE3, name)()

    predicate.__name__ = name
    return predicate


# CustomSpecAlgo lacks some methods of the enum that SGLang calls on any algorithm
# (carries_draft_hidden_states, create_future_map, need_topk in 0.5.23) and answers others as no
# EAGLE would. Take all of them from the enum.
for _name, _member in list(vars(SpeculativeAlgorithm).items()):
    if not inspect.isfunction(_member) or _name in vars(AuroraAlgorithm):
        continue
    # that one is an attribute of CustomSpecAlgo
    if _name.startswith(PREDICATES) and _name != "supports_overlap":
        setattr(AuroraAlgorithm, _name, _as_eagle3(_name))
    elif not _name.startswith("_") and _name != "create_worker":
        setattr(AuroraAlgorithm, _name, _member)


def _draft_directory(server_args: Any) -> Path:
    path = Path(server_args.speculative_draft_model_path)
    if path.is_dir() or str(path).startswith(("/", ".")):
        return path
    from huggingface_hub import snapshot_download

    try:
        revision = server_args.speculative_draft_model_revision
        return Path(
            snapshot_download(
                str(path), revision=revision, allow_patterns=["*.json", "*.safetensors"]
            )
        )
    except Exception as error:
        raise ValueError(
            f"--speculative-draft-model-path {path}: neither a directory nor a model that Hugging"
            f" Face gives: {error}. `aurora-trainer init-draft` makes an untrained draft for any"
            " target."
        ) from None
