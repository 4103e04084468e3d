"""The quick check of a usual message passes nothing that the whole check refuses."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_messages import verify_arrays

from aurora_sglang_plugin.link import rows

INTS = [-(2**31), -2, -1, 0, 1, 2, 3, 5, rows.MAX_POSITION - 4, rows.MAX_POSITION, 2**31 - 1]
# around every bound, and what has no order
FLOATS = [0.0, -0.5, 0.01, 0.5, 1.99, 2.0, 2.01, 2.1, 1e9, 1.01e9, 1e12, 1.01e12, 3.4e38, np.inf]
FLOATS += [-number for number in FLOATS] + [np.nan, -np.inf, -np.inf]
BITS = [0, 1, 0x5367, 0x5368, 0x5369, 0x7F80, 0x7FC0]
BITS += [0x8000 + bits for bits in BITS]


def usual(nodes, k, dtype="bfloat16"):
    """(arrays, dtypes): two chains; the first is accepted whole."""
    arrays = verify_arrays(range(-1, nodes - 1), dtype, k)
    # a distribution: K logits of the same size, and half of the mass
    arrays["logsumexp"][1][:] = np.log(2 * k)
    return {n: a for n, (_, a) in arrays.items()}, {n: d for n, (d, _) in arrays.items()}


def quick(arrays, dtypes, num_steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return rows.good_chains(num_steps, arrays, dtypes)


@given(st.integers(2, 6), st.integers(1, 5), st.sampled_from(["bfloat16", "float16", "float32"]))
def test_usual_messages_need_no_more(nodes, k, dtype):
    assert quick(*usual(nodes, k, dtype), nodes - 1)
    assert not quick(*usual(nodes, k, dtype), nodes - 2)


@pytest.mark.parametrize("kinds", ["i", "fu"], ids=["integers", "numbers"])
@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_what_passes_is_good(kinds, data):
    arrays, dtypes = usual(
        data.draw(st.integers(2, 5)),
        data.draw(st.integers(1, 4)),
        data.draw(st.sampled_from(["bfloat16", "float16", "float32"])),
    )
    if "f" in kinds:
        # all of the mass and more; and the same far from zero
        excess = data.draw(st.sampled_from([-0.7, 0.0, 0.004, 0.01, 0.02, 0.03]))
        far = data.draw(st.sampled_from([0.0, 0.0, 0.0, 5.0, 9e8, -9e8, 1.1e9, -1.1e9]))
        kept = arrays["topk_logits"].shape[-1]
        arrays["topk_logits"] += np.float32(far)
        arrays["logsumexp"][:] = np.float32(far) + np.float32(np.log(kept) - excess)
    names = sorted(name for name, array in arrays.items() if array.dtype.kind in kinds)
    for _ in range(data.draw(st.integers("i" in kinds, 2))):
        array = arrays[data.draw(st.sampled_from(names))]
        value = data.draw(st.sampled_from({"i": INTS, "f": FLOATS, "u": BITS}[array.dtype.kind]))
        place = data.draw(st.integers(0, array.size - 1))
        # one element, or all of them: too much by itself, or only together
        with np.errstate(over="ignore"):
            array.flat[place if data.draw(st.booleans()) else slice(None)] = value
    num_steps = arrays["accept_path"].shape[1] - 1
    lens, features = arrays["feature_lens"], arrays["aux_hidden_states"]
    # lengths that are not negative and add up: wire.decode checks that first
    if not (0 <= lens.min() and lens.max() < 99):
        return
    if len(features) != lens.sum():
        arrays["aux_hidden_states"] = np.resize(features, (lens.sum(), features.shape[1]))
    if quick(arrays, dtypes, num_steps):
        faults = rows._verify(num_steps, arrays, dtypes)
        assert not {cause for cause, found in faults.items() if found.any()}
