"""SGLang's server arguments as AURORA reads and writes them: resolved as for EAGLE3, with step
counts that may change, and with a draft made up where none is given.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from aurora_sglang_plugin.config import SpeculationConfig
from aurora_sglang_plugin.drafts.kinds import first_config
from aurora_sglang_plugin.serve.worth import candidate_steps

logger = logging.getLogger(__name__)

NAME = "AURORA"
# How SGLang makes up the weights of a server that has no draft yet, and its draft steps at most, if
# nothing else is said.
NO_DRAFT = "dummy"
FIRST_STEPS = 3


def record_of(server_args: Any) -> Any:
    """The ServerArgs behind the stand-in that SGLang 0.5.23 hands to a registered algorithm.

    The stand-in records attribute writes only; SGLang's own resolvers declare on the record.
    """
    try:
        view = object.__getattribute__(server_args, "_cfg")
    except AttributeError:
        # SGLang before the stand-in
        return server_args
    return object.__getattribute__(view, "_server_args")


def target_config_of(record: Any) -> dict[str, Any]:
    """The (text) config, with the architectures of the whole, by which SGLang chooses the model."""
    found = _model_config(record)
    return found.hf_text_config.to_dict() | {"architectures": found.hf_config.architectures}


def _model_config(record: Any) -> Any:
    try:
        from sglang.srt.arg_groups.overrides import model_config_of
    except ImportError:
        return record.get_model_config()
    return model_config_of(record)


def has_dp_attention(record: Any) -> bool:
    try:
        from sglang.srt.arg_groups.overrides import attn_dp_enabled_of, resolved_view
    except ImportError:
        # SGLang before attention data parallelism was resolved from sizes
        return bool(getattr(record, "enable_dp_attention", False))
    return attn_dp_enabled_of(resolved_view(record))


def read_as_sglang(record: Any, draft: Path) -> None:
    """Raises ValueError where SGLang refuses the draft's config, which it reads in the same way
    minutes later.
    """
    from sglang.srt.configs.model_config import ModelConfig

    length = _model_config(record).context_len
    try:
        ModelConfig.from_server_args(
            record, model_path=str(draft), is_draft_model=True, context_length=length
        )
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"draft {draft}: SGLang refuses its config.json: {type(error).__name__}: {text} "
            "`aurora-trainer import` writes one that it takes."
        ) from None


def start_without_a_draft(record: Any, server_args: Any) -> None:
    """A directory with the config of the draft that the trainer will make, whose weights are made
    up: nothing drafts with them. Raises ValueError for a target that no draft can be made for."""
    topk = server_args.speculative_eagle_topk
    if topk not in (None, 1):
        raise ValueError(
            f"AURORA without a draft needs --speculative-eagle-topk 1, this server's is {topk}:"
            " give --speculative-draft-model-path, or leave the topk out"
        )
    target = target_config_of(record)
    found = target.get("dtype") or target.get("torch_dtype") or "bfloat16"
    config = first_config(target).to_json(str(found).removeprefix("torch."))
    directory = Path(tempfile.mkdtemp(prefix="aurora-draft-"))
    (directory / "config.json").write_text(json.dumps(config))
    # the scheduler's processes read it while they start
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    steps = server_args.speculative_num_steps or FIRST_STEPS
    declared = dict(
        speculative_draft_model_path=str(directory),
        speculative_draft_load_format=NO_DRAFT,
        speculative_num_steps=steps,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=steps + 1,
    )
    for name, value in declared.items():
        setattr(server_args, name, value)


def resolve_as_eagle3(record: Any, speculation: SpeculationConfig, has_draft: bool) -> None:
    """Run SGLang's resolution of an EAGLE3 server.

    It reads the algorithm's name, so the name is EAGLE3 meanwhile.
    """
    _write_name(record, SpeculativeAlgorithm.EAGLE3.name)
    try:
        SpeculativeAlgorithm.EAGLE3.handle_server_args(record)
        fixed = _let_steps_change(record, speculation)
    finally:
        _write_name(record, NAME)
    if fixed and not has_draft:
        raise ValueError(
            "AURORA without a draft must be able to begin drafting while it serves, and here the"
            f" number of draft steps is fixed: {fixed}; give --speculative-draft-model-path DIR,"
            " `aurora-trainer init-draft` makes one for any target"
        )
    if fixed and speculation.adaptive:
        logger.warning("aurora drafts a fixed number of steps: %s", fixed)


def _let_steps_change(record: Any, speculation: SpeculationConfig) -> str | None:
    """Have SGLang prepare every step count from 0 to the most, as for its own adaptive mode; which
    one a round has is decided in serve/speculation.py. Returns why it cannot."""
    if not speculation.adaptive:
        return "plugin.speculation.adaptive is false"
    try:
        from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
        from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase
        from sglang.srt.speculative.adaptive_spec_params import adaptive_unsupported_reason
    except ImportError:
        return "this SGLang cannot change it"
    args = resolving_view(record)
    if reason := adaptive_unsupported_reason(record):
        return reason
    if args.speculative_use_rejection_sampling:
        return "speculative_use_rejection_sampling (a round without a draft leaves no q)"
    if args.disaggregation_mode != "null":
        return f"disaggregation_mode={args.disaggregation_mode}"
    if not args.speculative_num_steps:
        return "speculative_num_steps=0"
    steps = candidate_steps(args.speculative_num_steps)
    handle, path = tempfile.mkstemp(prefix="aurora-steps-", suffix=".json")
    with os.fdopen(handle, "w") as file:
        json.dump({"1": {"candidate_steps": steps}}, file)
    # the scheduler's processes read it while they start
    atexit.register(Path(path).unlink, missing_ok=True)
    declare_resolution(
        record, "aurora", speculative_adaptive=True, speculative_adaptive_config=path
    )
    if args.device == "cpu":
        # a CPU has no graphs, and SGLang would capture one of each step count
        graphs = with_phase(args.cuda_graph_config, Phase.DECODE, backend=Backend.DISABLED)
        declare_resolution(record, "aurora", cuda_graph_config=graphs)
    return None


def _write_name(record: Any, name: str) -> None:
    try:
        from sglang.srt.arg_groups.overrides import declare_resolution
    except ImportError:
        # SGLang before declarations: resolvers write the fields
        record.speculative_algorithm = name
    else:
        declare_resolution(record, "aurora", speculative_algorithm=name)
