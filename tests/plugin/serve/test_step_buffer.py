"""Where a packed step's parts lie, and what a token costs on its way to the trainer."""

import pytest
import torch
from aurora_kernels.pack_step import ints_parts, pack_step, pack_step_ref
from step_inputs import make_step

from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.serve.snapshot import Prefill, Verify
from aurora_sglang_plugin.serve.step_buffer import ALIGNED, layers_of, step_shape
from aurora_sglang_plugin.serve.transfer import HostTensors, Pinned, unpack

H, K, STEPS = 4096, 32, 4


@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("links", [False, True])
def test_parts_do_not_overlap(links, layers):
    shape = step_shape(3, 7, 5, links, 9, torch.float32, 33, layers, torch.bfloat16)
    buffer = torch.zeros(shape.nbytes, dtype=torch.uint8)
    views = shape.views(buffer)
    for n, view in enumerate(views.values()):
        view.fill_(n + 1)
        assert (view.data_ptr() - buffer.data_ptr()) % ALIGNED == 0
    found = unpack(buffer.numpy(), shape.layout)
    assert list(found) == list(views)
    for n, array in enumerate(found.values()):
        assert (array == array.flat[0]).all() and (n == len(views) - 1 or array.flat[0] == n + 1)
    assert [list(a.shape) for a in found.values()] == [list(v.shape) for v in views.values()]


@pytest.mark.parametrize("layers", [0, 3])
@pytest.mark.parametrize("rows", [None, [0, 2, 3]])
def test_without_kernels_each_row_has_its_place(rows, layers):
    """What was not accepted writes nothing."""
    step = make_step(5, 7, 4, 24, torch.bfloat16, 2, rows)
    ints, features, scales = pack_step_ref(step, layers)
    kept = 4 * len(ints)
    out = torch.full((kept, 24), 77, dtype=features.dtype)
    out_scales = torch.full((kept, layers), -5.0) if layers else None
    pack_step(step, out_ints := torch.empty_like(ints), out, out_scales)
    count = len(features)
    assert 0 < count < kept and torch.equal(out_ints, ints)
    assert torch.equal(out[:count], features) and (out[count:] == 77).all()
    if layers:
        assert torch.equal(out_scales[:count], scales) and (out_scales[count:] == -5).all()
    linked, chains = ints_parts(7, 4, True), ints_parts(7, 4, False)
    assert linked["next_sibling"].stop == ints.shape[1] and chains.items() < linked.items()


def test_a_scale_a_layer_or_one_a_row():
    assert [layers_of(12, 3), layers_of(13, 3), layers_of(13, 0)] == [3, 1, 0]


def sent_bytes(kind, snapshot, requests, **fields):
    """As publisher.Publisher sends it."""
    header = wire.Header(
        schema=wire.SCHEMA_VERSION, kind=kind, session="0" * 32, captured_seq=70000, sent_seq=70000,
        heartbeats=3, dropped={"queue_full": 100}, queued=0, target="f" * 32, draft_version=50,
        extend_version=50, time_ns=1 << 60, requests=[f"{n:032x}" for n in range(requests)],
        **fields,
    )  # fmt: skip
    parts = [bytes(part) for part in wire.encode(header, snapshot.build())]
    message = wire.decode(parts, max_bytes=64 << 20)
    assert not message.bad
    return sum(map(len, parts)), len(message.arrays["aux_hidden_states"])


@pytest.mark.parametrize(("layers", "most"), [(0, 25_200), (3, 12_900)])
def test_bytes_of_a_committed_token(layers, most):
    """32 requests of three layers of 4,096 in bfloat16, chains of four drafts: below 14 kB in
    float8, whatever is accepted."""
    size, nodes = 32, STEPS + 1
    step = make_step(size, nodes, nodes, 3 * H, torch.bfloat16)
    shape = step_shape(size, nodes, nodes, False, K, torch.float32, 3 * H, layers, torch.bfloat16)
    for length in (1, 3, 5):
        step["accept_lens"] = torch.full((size,), length, dtype=torch.int32)
        step["accept_index"] = torch.arange(size * nodes, dtype=torch.int32).view(size, nodes)
        step["draft_tokens"] = torch.arange(size * nodes)
        step["next_tokens"] = step["draft_tokens"].roll(-1)
        step["positions"] = torch.full((size * nodes,), 2000)
        buffer = torch.zeros(shape.nbytes, dtype=torch.uint8)
        views = shape.views(buffer)
        pack_step(step, views["ints"], views["features"], views.get("scales"))
        views["topk_ids"].copy_(torch.arange(K).expand(size * nodes, K))
        views["topk_logits"].copy_(-torch.arange(K).expand(size * nodes, K))
        views["logsumexp"].fill_(3.0)
        staged = Pinned(buffer.numpy(), shape.layout, shape.nbytes, None, None)
        snapshot = Verify(staged, K, layers=layers, shape=(nodes, nodes))
        nbytes, tokens = sent_bytes(
            "verify", snapshot, size, flags=[0] * size, num_steps=STEPS, topk=1
        )
        assert tokens == length * size
        print(f"layers={layers} accept_length={length}: {nbytes / tokens:,.0f} bytes a token")
        # kept logits are of all nodes: at an accept length of 1 they are a tenth
        assert nbytes / tokens <= (most if length > 1 else most + 1_300)


@pytest.mark.parametrize(("layers", "most"), [(0, 24_700), (3, 12_400)])
def test_bytes_of_a_prompts_token(layers, most):
    tokens = 512
    staged = HostTensors().stage({
        "hidden": torch.randn(tokens, 3 * H).bfloat16(), "input_ids": torch.arange(tokens),
        "rotated_ids": torch.arange(tokens) + 1, "seq_lens": torch.tensor([tokens]),
    })  # fmt: skip
    snapshot = Prefill(staged, [0], [tokens], [tokens], [()], layers=layers)
    nbytes, rows = sent_bytes("prefill", snapshot, 1)
    assert rows == tokens and nbytes / tokens <= most
