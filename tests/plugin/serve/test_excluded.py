"""Which requests stay out of capture: once for each, by cause, whatever the client wrote."""

from types import SimpleNamespace

import msgspec
import pytest
from test_capture import make_capture, prefill_step, request, verify_step

from aurora_sglang_plugin.link.rows import MAX_REQUEST_ID_BYTES, request_id_fits
from aurora_sglang_plugin.serve.excluded import CAUSES, why_excluded


def cause(rid="r", **fields):
    req = request(rid, **fields.pop("params", {}))
    vars(req).update(fields)
    return why_excluded(req, fields.get("rate", 1.0))


@pytest.mark.parametrize(
    "value", [False, "false", "False", "no", "true", 0, 1, 0.0, None, "", [], {}]
)
def test_an_opt_out_fails_closed(value):
    """Written in whatever way: only a literal true says that the request may be taken."""
    assert cause(params={"custom_params": {"aurora_capture": value}}) == "opt_out"


@pytest.mark.parametrize(
    "custom",
    [
        {"Aurora_Capture": False}, {"AURORA_CAPTURE": True}, {"aurora-capture": False},
        {"auroraCapture": False}, {"aurora_capture ": False}, {"aurora_captrue": False},
        {"aurora": {"capture": False}}, {"custom_params": {"aurora_capture": False}},
        {"aurora_opt_out": True}, {"aurora_domain": "code", "aurora_opt-out": 1},
    ],
)  # fmt: skip
def test_a_key_that_is_nearly_auroras_keeps_the_request_out(custom):
    """Whatever was meant by it: nobody who wanted to stay out is taken because of a spelling."""
    assert cause(params={"custom_params": custom}) == "opt_out"


def test_what_says_nothing_of_capture_is_taken():
    assert cause(params={"custom_params": {"aurora_domain": "code", "other": {"a": 1}}}) is None
    for custom in (None, {}, {"something": "else"}, {"aurora_capture": True}):
        assert cause(params={"custom_params": custom}) is None
    # nobody can tell what was meant
    assert cause(params={"custom_params": "aurora_capture=false"}) == "opt_out"


@pytest.mark.parametrize(
    "rid",
    [
        "",
        "x" * (MAX_REQUEST_ID_BYTES + 1),
        "😀" * (MAX_REQUEST_ID_BYTES // 4) + "x",
        "я" * MAX_REQUEST_ID_BYTES,
        7,
        None,
        ["a"],
        "\ud800",
        "a\udfffb",
    ],
)
def test_ids_that_no_message_may_carry(rid):
    assert not request_id_fits(rid) and cause(rid) == "request_id"


def test_ids_that_a_message_may_carry():
    for rid in (
        "x" * MAX_REQUEST_ID_BYTES,
        "😀" * (MAX_REQUEST_ID_BYTES // 4),
        "трасса-1",
        "😀",
        "HEALTH",
    ):
        assert request_id_fits(rid) and cause(rid) is None
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(rid)) == rid


def test_what_no_token_id_says():
    assert cause(multimodal_inputs=SimpleNamespace(mm_items=[])) == "multimodal"
    assert cause(input_embeds=[[0.0]]) == "embeddings"
    assert cause(positional_embed_overrides=SimpleNamespace()) == "embeddings"
    assert (
        cause(multi_item_delimiter_indices=[3]) == "scoring"
        and cause(decision_layout=[1]) == "scoring"
    )
    assert cause(lora_id="adapter") == "lora"
    assert cause("HEALTH_CHECK_1234") == "health_check"
    assert cause(multimodal_inputs=None, input_embeds=None, lora_id=None) is None


def test_every_request_is_counted_once_whatever_happens_to_it():
    capture = make_capture()
    image = request("image")
    image.multimodal_inputs = SimpleNamespace()
    out, taken = request("out", custom_params={"aurora_capture": "false"}), request("taken")
    for _ in range(3):
        prefill_step(capture, [image, out, taken], [0, 0, 0], [2, 2, 2])
        verify_step(capture, [image, out, taken])
        # SGLang releases it at an abort, before the request ends
        image.multimodal_inputs = None
    for req in (image, out, taken):
        capture.ended(req)
    assert capture.excluded == {"multimodal": 1, "opt_out": 1} and capture.excluded.keys() <= {
        *CAUSES
    }
    assert {rid for _, _, fields in capture.publisher.items for rid in fields["requests"]} == {
        "taken"
    }
    assert capture.boundary.errors == 0


def test_a_bad_id_costs_its_own_request_only():
    capture = make_capture()
    verify_step(capture, [request("x" * 2000), request("good"), request(5)])
    ((_, _, fields),) = capture.publisher.items
    assert (
        fields["requests"] == ["good"]
        and capture.excluded == {"request_id": 2}
        and capture.boundary.errors == 0
    )


def test_a_share_of_the_requests_is_counted_too():
    capture = make_capture(sample_rate=0.25)
    taken = sum(capture.sampled(request(str(n))) for n in range(400))
    assert 60 < taken < 140 and capture.excluded == {"sample_rate": 400 - taken}


def test_without_a_trainer_few_are_taken_and_all_as_soon_as_there_is_one():
    capture = make_capture()
    capture.publisher.no_trainer = True
    taken = sum(capture.sampled(request(f"request-{n}")) for n in range(5000))
    assert 5 < taken < 50 and capture.excluded == {"no_trainer": 5000 - taken}
    # a share of a share
    capture = make_capture(sample_rate=0.25)
    capture.publisher.no_trainer = True
    taken = sum(capture.sampled(request(f"request-{n}")) for n in range(20_000))
    assert 5 < taken < 50 and capture.excluded["no_trainer"] > 4000
    capture.publisher.no_trainer = False
    assert all(make_capture().sampled(request(f"request-{n}")) for n in range(100))
