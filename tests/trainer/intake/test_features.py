"""Features reach the trainer as they were, or as near as float8 is."""

import numpy as np
import pytest
import torch
from aurora_kernels.pack_step import float8_ref
from wire_messages import MAX, MESSAGES, as_float8, prefill_arrays, verify_arrays

from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.serve.transfer import as_array
from aurora_trainer.intake.assemble import AssembleConfig, Assembler
from aurora_trainer.intake.features import ROWS, features_of, to_bfloat16


def decoded(kind, arrays=None):
    sent, usual = MESSAGES[kind]()
    parts = wire.encode(sent, arrays or usual)
    return wire.decode([bytes(part) for part in parts], max_bytes=MAX)


def test_others_are_what_was_sent():
    for kind in ("prefill", "verify"):
        message = decoded(kind)
        dtype, array = features_of(message)
        assert dtype == message.dtype("aux_hidden_states")
        assert array is message.arrays["aux_hidden_states"]


def test_every_code():
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 0x7F) != 0x7F][None].repeat(4, 0)
    scales = np.array([[1.0, 2.0], [1e-9, 0.1], [2**-20, 3e5], [0.0, 7.0]], np.float32)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().unflatten(1, (2, -1))
    expected = (values * torch.from_numpy(scales)[:, :, None]).flatten(1).bfloat16()
    found = torch.from_numpy(to_bfloat16(codes, scales)).view(torch.bfloat16)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [0, 1, ROWS, ROWS + 1])
def test_float8_is_near(rows):
    """Within half a step: 1/16 of a number, or of the smallest step of its row and layer."""
    features = torch.randn(rows, 3 * 64, generator=torch.Generator().manual_seed(rows)) * 10
    codes, scales = (t.numpy() for t in float8_ref(features, 3))
    arrays = prefill_arrays() | {
        "feature_lens": ("int32", np.array([rows, 0], np.int32)),
        "extend_lens": ("int32", np.array([rows, 5], np.int32)),
        "input_ids": ("int32", np.zeros(rows + 5, np.int32)),
    }
    arrays.pop("aux_hidden_states")
    arrays |= {"aux_hidden_states": ("float8", codes), "aux_scales": ("float32", scales)}
    dtype, bits = features_of(decoded("prefill in float8", arrays))
    found = torch.from_numpy(bits).view(torch.bfloat16).float()
    steps = torch.from_numpy(scales).repeat_interleave(64, 1) * 2**-9
    assert dtype == "bfloat16" and found.shape == features.shape
    assert ((found - features).abs() <= features.abs() / 15 + steps).all()


def test_samples_of_float8_are_samples_of_bfloat16():
    """The same request, told in either: the same sample, but for what the features lost."""
    samples = []
    for float8 in (False, True):
        assembler = Assembler(AssembleConfig())
        messages = []
        for kind, arrays in (("prefill", prefill_arrays()), ("verify", verify_arrays())):
            sent = MESSAGES[kind]()[0]
            sent.flags = [0, 0] if kind == "verify" else []
            sent.requests = ["a", "b"]
            sent.sent_seq = sent.captured_seq = len(messages) + 1
            if kind == "prefill":
                arrays["positions"] = "int32", np.array([7, 18], np.int32)
                # the root of the verify step
                arrays["next_tokens"] = "int32", verify_arrays()["draft_tokens"][1][:, 0].copy()
                arrays["aux_hidden_states"] = "bfloat16", np.full((4, 6), 0x3F80, np.uint16)
            else:
                features = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
                arrays["aux_hidden_states"] = "bfloat16", as_array(features.bfloat16())
            arrays = as_float8(arrays, 2) if float8 else arrays
            messages.append(wire.encode(sent, arrays))
        end, lens = MESSAGES["end"]()
        end.sent_seq = end.captured_seq = 3
        lens["committed_lens"] = "int32", np.array([16, 22], np.int32)
        messages.append(wire.encode(end, lens))
        done = []
        for parts in messages:
            done += assembler.add(wire.decode([bytes(p) for p in parts], max_bytes=MAX))
        samples.append(done)
    for one, other in zip(*samples, strict=True):
        assert one.features.dtype == other.features.dtype == torch.bfloat16
        assert torch.equal(one.tokens, other.tokens) and one.request == other.request
        torch.testing.assert_close(
            one.features.float(), other.features.float(), rtol=0.07, atol=0.01
        )
    assert samples[0]
