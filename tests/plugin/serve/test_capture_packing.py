"""A step taken as on a GPU, where it is packed before it leaves: the same as on a CPU."""

import pytest
import torch
from test_capture import CPU, F, N, Offered, V, make_capture, prefill_step, request, verify_step

from aurora_sglang_plugin.config import CaptureConfig
from aurora_sglang_plugin.serve.capture import Capture
from aurora_sglang_plugin.serve.step_buffer import node_rows
from aurora_sglang_plugin.serve.transfer import HostTensors, Pinned, pack


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
