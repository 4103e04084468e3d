"""Every formula against the thing itself: encoded messages, files, samples, and a real training
step.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import make_random_target
from random_sample import random_sample

from aurora_sglang_plugin.drafts.eagle3_for_target import draft_config
from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.serve.snapshot import Prefill
from aurora_sglang_plugin.serve.step_buffer import StepShape
from aurora_sglang_plugin.serve.transfer import HostTensors
from aurora_sglang_plugin.weights.writer import WeightsWriter
from aurora_trainer.checkpoint import save_checkpoint
from aurora_trainer.config import TrainerFile
from aurora_trainer.drafts.batch import BatchConfig, pack
from aurora_trainer.drafts.eagle3_init import init_draft
from aurora_trainer.drafts.eagle3_sizes import version_bytes
from aurora_trainer.drafts.target import open_target
from aurora_trainer.learn.objective import LossConfig, losses
from aurora_trainer.learn.optimizer import Optimizer, OptimizerConfig
from aurora_trainer.tools import sizes

V, H = 320, 64
SETTINGS = TrainerFile.model_validate({"trainer": {"model": {"target": "t", "draft": "d"}}})


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_random_target(tmp_path_factory.mktemp("target"), vocab=V, hidden=H)


def draft_of(target, draft_vocab=None):
    return draft_config(open_target(target).config, draft_vocab or V, kind="random")


@pytest.mark.parametrize(
    "load", [sizes.Load(running=5, num_steps=4), sizes.Load(running=3, topk=2, draft_tokens=9)]
)
def test_bytes_of_a_verify_message(load, target):
    """Frames to the byte; the header but for how large its counters are."""
    draft, b, n, p, k = draft_of(target), load.running, load.nodes, load.num_steps + 1, 6
    lens = np.arange(b, dtype=np.int32) % p + 1
    load = replace(load, accept_length=float(lens.mean()))
    letters = {"B": b, "N": n, "P": p, "K": k, "T": int(lens.sum()), "F": draft.feature_size}
    arrays = {}
    for name, (dtypes, shape) in wire.FRAMES["verify"].items():
        dtype = (
            "bfloat16"
            if name == "aux_hidden_states"
            else "float32"
            if "float32" in dtypes
            else "int32"
        )
        arrays[name] = (dtype, np.zeros([letters[letter] for letter in shape], wire.DTYPES[dtype]))
    header = wire.Header(
        schema=wire.SCHEMA_VERSION, kind="verify", session="0" * 32, captured_seq=70000,
        sent_seq=70000, heartbeats=3,
        dropped={}, queued=0,
        target="0" * 32, draft_version=3, extend_version=3, time_ns=1_700_000_000_000_000_000,
        requests=[f"{i:032d}" for i in range(b)], flags=[0] * b, num_steps=load.num_steps,
        topk=load.topk,
    )  # fmt: skip
    parts = wire.encode(header, arrays)
    frames = sum(map(len, parts[1:]))
    planned = sizes.verify_bytes(draft, load, 2, k)
    assert planned - sizes.header_bytes("verify", load, k) == frames
    assert sizes.header_bytes("verify", load, k) == pytest.approx(len(parts[0]), rel=0.1)


@pytest.mark.parametrize("features", ["model", "float8"])
@pytest.mark.parametrize("topk", [1, 2])
def test_bytes_that_wait_in_the_queue(topk, features, target):
    """What a CUDA server stages of a step, but for what it leaves between the parts."""
    draft, b, k = draft_of(target), 5, 6
    load = sizes.Load(num_steps=3, topk=topk, draft_tokens=7 if topk > 1 else 0)
    layers = draft.num_aux if features == "float8" else 0
    shape = StepShape(
        b, load.nodes, load.num_steps + 1, topk > 1, k, torch.float32, draft.feature_size, layers,
        torch.bfloat16,
    )  # fmt: skip
    planned = b * sizes.queued_row_bytes(draft, load, 2, k, features)
    assert 0 <= shape.nbytes - planned < 16 * len(shape.parts)


@pytest.mark.parametrize("features", ["model", "float8"])
def test_bytes_of_a_prompt(features, target):
    draft, tokens = draft_of(target), 40
    layers = draft.num_aux if features == "float8" else 0
    staged = HostTensors().stage({
        "hidden": torch.zeros(tokens, draft.feature_size, dtype=torch.bfloat16),
        "input_ids": torch.zeros(tokens), "rotated_ids": torch.zeros(tokens),
        "seq_lens": torch.tensor([tokens]),
    })  # fmt: skip
    arrays = Prefill(staged, [0], [tokens], [tokens], [()], layers=layers).build()
    planned = sizes.prefill_bytes(draft, tokens, 2, features)
    planned -= sizes.header_bytes("prefill", sizes.Load(running=1), 0)
    assert planned == sum(array.nbytes for _, array in arrays.values())


@pytest.mark.parametrize("draft_vocab", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_a_version_and_a_checkpoint(draft_vocab, dtype, target, tmp_path):
    counts = torch.arange(V)
    draft = init_draft(
        target, tmp_path / "d", "random", draft_vocab=draft_vocab, token_counts=counts
    )
    opened = open_target(target)
    config = draft_of(target, draft_vocab)
    assert config == draft.config
    assert sizes.parameter_count(config, opened) == sum(p.numel() for p in draft.parameters())
    writer = WeightsWriter(tmp_path / "w")
    writer.publish(
        draft.checkpoint(dtype), draft.config.to_json(), target="t", parent=0, optimizer_step=0
    )
    writer.close()
    file = tmp_path / "w" / "v000001" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert version_bytes(config, opened, dtype.itemsize) == file.stat().st_size - header

    draft.compute_in("cpu", dtype)
    tensors = {f"draft/{n}": p for n, p in draft.named_parameters()}
    tensors |= {
        f"optimizer/{n}": t for n, t in Optimizer(draft, OptimizerConfig()).state_dict()[0].items()
    }
    (tmp_path / "c").mkdir()
    path = save_checkpoint(tmp_path / "c", 1, tensors, {}, keep=2) / "state.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert sizes.checkpoint_bytes(config, opened, dtype.itemsize) == path.stat().st_size - header


def test_bytes_of_a_sample(target):
    draft, prompt, kept = draft_of(target), 30, 6
    sample = random_sample(
        1,
        prompt_len=prompt,
        verifies=40,
        num_steps=3,
        topk=1,
        features=draft.feature_size,
        kept=kept,
    )
    generated, trees = len(sample.features) - prompt, len(sample.tree_first)
    load = sizes.Load(num_steps=3, accept_length=generated / trees)
    planned = sizes.sample_bytes(draft, load, 4, kept) * generated + prompt * (
        draft.feature_size * 4 + 20
    )
    # tokens are one more than positions
    assert sample.nbytes - planned == pytest.approx(8)


def kept_bytes(draft, batch):
    """What autograd holds between forward and backward, each storage once, parameters and inputs
    apart.
    """
    own = {
        p.untyped_storage().data_ptr() for p in [*draft.parameters(), draft.embed, draft.inv_freq]
    }
    held = {}

    def pack_hook(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        losses(draft, batch, LossConfig())
    return sum(nbytes for nbytes, _ in held.values())


@pytest.mark.parametrize("shape", [{"hidden": 64}, {"hidden": 128, "kv_heads": 4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_step_keeps(shape, dtype, tmp_path):
    target = make_random_target(tmp_path / "t", vocab=200, **shape)
    draft = init_draft(target, tmp_path / "d", "random").compute_in("cpu", dtype)
    width = draft.config.feature_size
    samples = [
        random_sample(i, prompt_len=2, verifies=60, num_steps=4, topk=1, features=width)
        for i in range(4)
    ]
    batch = pack(samples, BatchConfig(rejected=False))
    positions, rows = len(batch.tokens), len(batch.levels[0])
    # tree_loss' own, planned apart
    head = 4 * 200 * shape["hidden"]
    planned = sizes.activation_bytes(draft.config, positions, rows, 4, dtype.itemsize)
    assert kept_bytes(draft, batch) - head == pytest.approx(planned, rel=0.2)


PEAK = """
import sys, torch
from pathlib import Path
from aurora_trainer.tools import sizes
from aurora_trainer.drafts.batch import BatchConfig, pack
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.config import TrainerFile
from aurora_trainer.learn.objective import LossConfig, losses
from aurora_trainer.learn.optimizer import Optimizer, OptimizerConfig
from aurora_trainer.drafts.target import open_target
sys.path.insert(0, sys.argv[3])
from random_sample import random_sample
torch.set_num_threads(1)
target, folder = open_target(sys.argv[1]), sys.argv[2]
width, positions = Draft.load(folder, target.embedding()).config.feature_size, 512
about = dict(prompt_len=1, verifies=60, num_steps=3, topk=1, features=width)
samples = [random_sample(i, **about) for i in range(4)]
batch = pack(samples, BatchConfig(rejected=False))
def status(key):
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024
def step(draft, optimizer):
    loss = losses(draft, batch, LossConfig()).loss_sum
    loss.backward()
    optimizer.step(loss)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)  # what the libraries take once is not the plan's
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = status("VmRSS:")
embed = target.embedding().float().clone()
draft, served, initial = (Draft.load(folder, embed) for _ in range(3))
optimizer = Optimizer(draft, OptimizerConfig())
for _ in range(2):
    step(draft, optimizer)
print(status("VmHWM:") - before, len(batch.tokens))
"""


def test_memory_of_a_real_trainers_step(tmp_path):
    """The process' peak over what the libraries take: a draft of 6M parameters in float32, two
    steps on the CPU.
    """
    target = make_random_target(
        tmp_path / "t", vocab=4096, hidden=512, layers=5, heads=8, kv_heads=4
    )
    draft = init_draft(target, tmp_path / "d", "random")
    command = [
        sys.executable,
        "-c",
        PEAK,
        str(target),
        str(tmp_path / "d"),
        str(Path(__file__).parents[2] / "support"),
    ]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    measured, positions = map(int, output.split())
    settings = TrainerFile.model_validate(
        {"trainer": {"model": {"target": "t", "draft": "d"}, "batch": {"max_positions": positions}}}
    )
    device = sizes.trainer_device_bytes(
        draft.config, open_target(target), settings.trainer, 4, sizes.Load(num_steps=3)
    )
    planned = sum(device.values())
    print(f"planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB: {device}")
    assert measured == pytest.approx(planned, rel=0.15)
