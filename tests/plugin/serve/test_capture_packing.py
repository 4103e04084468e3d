"""A step taken as on a GPU, where it is packed before it leaves: the same as on a CPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from aurora_kernels.pack_step import float8, pack_step_ref
from step_inputs import make_step
from test_capture import CPU, F, N, Offered, V, make_capture, prefill_step, request, verify_step

from aurora_sglang_plugin.config import CaptureConfig
from aurora_sglang_plugin.serve.capture import Capture
from aurora_sglang_plugin.serve.step_buffer import Packing, node_rows
from aurora_sglang_plugin.serve.transfer import HostTensors, Pinned, PinnedBuffers, pack


class Packs(HostTensors):
    """Stages as PinnedBuffers does: what it is given is not private until it is packed."""

    packs, buffer_bytes = True, 1 << 20

    def private(self, tensor):
        return tensor

    def stage(self, tensors):
        return self.carry(*pack(tensors))

    def carry(self, packed, layout):
        return Pinned(packed.numpy(), layout, packed.nbytes, None, None)


@pytest.mark.parametrize("features", ["model", "float8"])
@pytest.mark.parametrize("sampled", [True, False], ids=["all", "one of two"])
@pytest.mark.parametrize("topk", [1, 2])
def test_what_is_packed_is_what_was_there(topk, sampled, features):
    """On a GPU and on a CPU the same, to the byte: steps that overwrite their tensors right
    afterwards; chains without their links."""
    built = []
    for transfer in (HostTensors(), Packs()):
        torch.manual_seed(0)
        config = CaptureConfig(topk_logits=5, features=features)
        capture = Capture(config, Offered(), CPU, num_steps=2, topk=topk, layers=(3, F // 3))
        capture.transfer = transfer
        verify_step(
            capture, [request("a"), request("b", custom_params={"aurora_capture": sampled})]
        )
        prefill_step(capture, [request("a", range(4)), request("b", range(9))], [0, 0], [4, 3])
        built.append([snapshot.build() for _, snapshot, _ in capture.publisher.items])
        assert not capture.boundary.errors
    assert built[0][0]["parents"][1].tolist() == [[-1, 0, 1, 2]] * (1 + sampled)
    for arrays in built[0]:
        dtype, found = arrays["aux_hidden_states"]
        assert dtype == ("float32" if features == "model" else "float8")
        assert features == "model" or arrays["aux_scales"][1].shape == (len(found), 3)
    for one, other in zip(*built, strict=True):
        assert list(one) == list(other)
        for name, (dtype, array) in one.items():
            assert dtype == other[name][0] and array.tobytes() == other[name][1].tobytes(), name


def test_on_a_gpu_the_logits_of_sampled_rows_are_read_where_they_lie():
    assert node_rows(torch.tensor([0, 2]), N).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert node_rows(None, N) is None


def test_a_step_that_fits_no_buffer_is_a_drop():
    capture = make_capture()
    capture.transfer = Packs()
    capture.transfer.buffer_bytes = 100
    verify_step(capture, [request("a")])
    assert capture.publisher.drops == ["too_large"] and not capture.publisher.items
    assert not capture.boundary.errors


@pytest.mark.parametrize("features", ["model", "float8"])
def test_kernels_are_loaded_before_serving(features):
    """They run once with each kind of arguments that a step has, and what they leave is let go."""
    capture = make_capture(features=features)
    capture.transfer, capture._feature_width = Packs(), F
    runs = []
    carry = capture.transfer.carry
    capture.transfer.carry = lambda *packed: runs.append(packed) or carry(*packed)
    capture.prewarm(V, torch.bfloat16)
    assert len(runs) == 8 and not capture.publisher.items and not capture.boundary.errors


@pytest.mark.parametrize("features", ["model", "float8"])
@pytest.mark.parametrize("topk", [1, 2])
def test_without_kernels_nothing_waits_for_the_device(topk, features):
    """On a GPU that runs none, as ROCm's: a meta tensor raises where its values are asked for."""
    packing = Packing(5, 3 if features == "float8" else 0, topk > 1)
    carried = []

    class Carries(Packs):
        def carry(self, packed, layout):
            carried.append(packed.device.type)
            return Pinned(np.zeros(packed.nbytes, np.uint8), layout, packed.nbytes, None, None)

    step = make_step(3, N, 3, F, torch.bfloat16, topk, where="meta")
    result = SimpleNamespace(
        accept_lens=step["accept_lens"], accept_index=step["accept_index"],
        next_token_ids=step["next_tokens"],
        logits_output=SimpleNamespace(
            hidden_states=step["hidden"], next_token_logits=torch.empty(3 * N, V, device="meta")
        ),
    )  # fmt: skip
    links = torch.empty(3, N, dtype=torch.int64, device="meta")
    tree = SimpleNamespace(
        positions=step["positions"], draft_token=step["draft_tokens"], retrieve_next_token=links,
        retrieve_next_sibling=links,
    )  # fmt: skip
    for rows in (None, torch.empty(2, dtype=torch.int64, device="meta")):
        assert packing.pack(tree, result, rows, Carries())
    float8(step["hidden"], 3)
    assert carried == ["meta"] * 2
    # the reference does wait, on the publisher's thread
    with pytest.raises((NotImplementedError, RuntimeError)):
        pack_step_ref(step, 0)


def test_a_gpu_without_kernels_is_told_of_once_at_start(monkeypatch, caplog):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    PinnedBuffers(torch.device("cuda"), buffers=0, buffer_bytes=1)
    (record,) = caplog.records
    assert "sm_80" in record.getMessage() and "plugin.capture.sample_rate" in record.getMessage()
