"""SGLang's own loader, asked about drafts: python sglang_loader.py TARGET reads their directories,
one a line, and prints one JSON object a line.

For a draft: {"error": ...}, or the parameters' shapes, those that no tensor was loaded into, the
switches that the module was built with, and rows of its rotary table; in both cases what AURORA's
own start says of its config ("start", None: nothing). The last line is what each of SGLang's
targets captures.
"""

import inspect
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ |= {
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}

from aurora_sglang_plugin import cpu_engine

cpu_engine.install()

import torch  # noqa: E402
from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.distributed.parallel_state import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.model_loader.loader import DefaultModelLoader, _initialize_model  # noqa: E402
from sglang.srt.model_loader.utils import set_default_torch_dtype  # noqa: E402
from sglang.srt.models.registry import ModelRegistry  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, override_platform, publish  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

from aurora_sglang_plugin import server_args  # noqa: E402

POSITIONS = (0, 1, 2, 7, 63, 200)
LAYERS = 12
IDS = (None, [1, 5, 8], [2, 6, 9], [0, 4, 10], [3, 7, 11], [4, 8, 12])


def start() -> None:
    override_platform(has_amx=True).install()
    publish(
        ServerArgs(model_path="none", device="cpu"), role="test", ranks=SpawnRanks(world_rank=0)
    )
    store = f"file://{os.environ['TMPDIR']}/aurora-store-{os.getpid()}"
    init_distributed_environment(1, 0, store, 0, backend="gloo")
    initialize_model_parallel(backend="gloo")


def load(directory: str) -> torch.nn.Module:
    """As a server loads a draft, but that a parameter without a tensor stays NaN."""
    config = ModelConfig(
        directory, is_draft_model=True, dtype="float32", speculative_algorithm="EAGLE3"
    )
    loader = DefaultModelLoader(LoadConfig())
    with set_default_torch_dtype(config.dtype):
        model = _initialize_model(config, loader.load_config)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        loader.load_weights_and_postprocess(
            model, loader._get_all_weights(config, model), torch.device("cpu")
        )
    return model


def describe(model: torch.nn.Module) -> dict:
    attention = model.model.layers[0].self_attn
    table = attention.rotary_emb.cos_sin_cache
    parameters = dict(model.named_parameters())
    return {
        "shapes": {n: list(p.shape) for n, p in parameters.items()},
        "unloaded": [
            n for n, p in parameters.items() if p.isnan().any() and "embed_tokens" not in n
        ],
        "norm_output": bool(model.model.norm_output),
        "norm_before_fc": model.model.input_norm is not None,
        "fc_norm": model.model.fc_norm is not None,
        "eps": model.model.norm.variance_epsilon,
        "heads": [attention.total_num_heads, attention.total_num_kv_heads, attention.head_dim],
        "num_aux": model.model.num_aux_hidden_states,
        "neox": attention.rotary_emb.is_neox_style,
        "rope": {p: table[p].tolist() for p in POSITIONS if p < len(table)},
        "hot_token_id": None if model.hot_token_id is None else model.hot_token_id.tolist(),
    }


def start_says(record: ServerArgs, directory: str) -> str | None:
    try:
        server_args.read_as_sglang(record, Path(directory))
    except ValueError as error:
        return str(error)
    return None


def captured() -> dict[str, dict]:
    """Architecture -> where it is defined, and what it captures (what ENTERS these layers) for each
    of IDS."""
    found = {}
    for name in sorted(ModelRegistry.get_supported_archs()):
        model_class = ModelRegistry.models[name]
        method = getattr(model_class, "set_eagle3_layers_to_capture", None)
        if method is None:
            continue
        try:
            taken = [_capture(method, ids) for ids in IDS]
        except AttributeError:
            # hands on to the language model inside, whose class is asked by itself
            continue
        found[name] = {"module": Path(inspect.getfile(method)).stem, "taken": taken}
    return found


def _capture(method, ids) -> list[int]:
    inner = SimpleNamespace(layers=[SimpleNamespace() for _ in range(LAYERS + 1)])
    inner.set_eagle3_layers_to_capture = lambda taken: setattr(inner, "layers_to_capture", taken)
    config = SimpleNamespace(
        num_hidden_layers=LAYERS, text_config=SimpleNamespace(num_hidden_layers=LAYERS)
    )
    group = SimpleNamespace(is_last_rank=True)
    outer = SimpleNamespace(
        pp_group=group, config=config, model=inner, language_model=SimpleNamespace()
    )
    method(outer, None if ids is None else list(ids))
    return getattr(inner, "layers_to_capture", None) or outer.language_model.layers_to_capture


if __name__ == "__main__":
    start()
    record = ServerArgs(model_path=sys.argv[1], device="cpu")
    out, sys.stdout = sys.stdout, sys.stderr
    for directory in map(str.strip, sys.stdin):
        try:
            answer = describe(load(directory))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer | {"start": start_says(record, directory)}), file=out)
    print(json.dumps({"layers": LAYERS, "ids": IDS, **captured()}), file=out, flush=True)
