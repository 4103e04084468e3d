"""What is taken of a step, on stand-ins for SGLang's batches; tests/loop/test_capture_reference.py
has real ones.
"""

from types import SimpleNamespace

import pytest
import torch

from aurora_sglang_plugin.config import CaptureConfig
from aurora_sglang_plugin.link.wire import FLAG_ALTERED_DISTRIBUTION
from aurora_sglang_plugin.serve.capture import KINDS, Capture
from aurora_sglang_plugin.serve.capture_boundary import Boundary

V, F, N, P = 50, 6, 4, 3
CPU = torch.device("cpu")


class Offered:
    """Stands where the publisher does, and keeps what it is offered."""

    no_trainer = False

    def __init__(self):
        self.items, self.drops = [], []

    def offer(self, kind, snapshot, **fields):
        self.items.append((kind, snapshot, fields))

    def drop(self, cause):
        self.drops.append(cause)


def make_capture(**config):
    return Capture(CaptureConfig(**config), Offered(), CPU, num_steps=2, topk=2)


def sampling_params(**changes):
    usual = dict(
        custom_params=None, logit_bias=None, frequency_penalty=0.0, presence_penalty=0.0,
        repetition_penalty=1.0,
        min_new_tokens=0,
    )  # fmt: skip
    return SimpleNamespace(**{**usual, **changes})


def request(rid="r", prompt=range(5), output=(), finished=None, grammar=None, **params):
    return SimpleNamespace(
        rid=rid, origin_input_ids=list(prompt), output_ids=list(output), finished_len=None,
        grammar=grammar,
        sampling_params=sampling_params(**params), finished=lambda: finished is not None,
        finished_reason=(
            None if finished is None else SimpleNamespace(to_json=lambda: {"type": finished})
        ),
    )  # fmt: skip


def test_sampling_is_by_request_id():
    ids = [f"request-{i}" for i in range(2000)]
    some = {rid for rid in ids if make_capture(sample_rate=0.3).sampled(request(rid))}
    assert some == {rid for rid in ids if make_capture(sample_rate=0.3).sampled(request(rid))}
    assert 0.25 < len(some) / len(ids) < 0.35
    assert some < {rid for rid in ids if make_capture(sample_rate=0.6).sampled(request(rid))}
    assert all(make_capture(sample_rate=1.0).sampled(request(rid)) for rid in ids)
    assert not any(make_capture(sample_rate=0.0).sampled(request(rid)) for rid in ids)


def test_opting_out():
    capture = make_capture()
    assert not capture.sampled(request(custom_params={"aurora_capture": False}))
    for custom in ({"aurora_capture": True}, {"something": "else"}, {}):
        assert capture.sampled(request(custom_params=custom))


def test_health_checks_are_not_taken():
    assert not make_capture().sampled(request("HEALTH_CHECK_1234"))


def verify_step(capture, reqs):
    size = len(reqs)
    logits = torch.randn(size * N, V)
    tree = SimpleNamespace(
        draft_token=torch.arange(size * N),
        positions=torch.arange(size).repeat_interleave(N) + 10,
        retrieve_next_token=torch.tensor([[1, 2, 3, -1]]).repeat(size, 1),
        retrieve_next_sibling=torch.full((size, N), -1),
    )
    result = SimpleNamespace(
        logits_output=SimpleNamespace(
            hidden_states=torch.randn(size * N, F), next_token_logits=logits
        ),
        accept_index=torch.arange(size)[:, None] * N + torch.arange(P),
        accept_lens=torch.full((size,), P),
        next_token_ids=torch.arange(size * N) + 1,
    )
    info = SimpleNamespace(watermark_candidates_host=[req.rid == "watermarked" for req in reqs])
    batch = SimpleNamespace(reqs=reqs, seq_lens=torch.full((size,), 10), sampling_info=info)
    capture.before_verify(batch)
    # as sampling may edit them in place
    judged = logits.mul_(0.5).clone()
    capture.verify(batch, tree, result, 3, 4)
    for tensor in (
        logits,
        tree.draft_token,
        tree.positions,
        result.logits_output.hidden_states,
        result.next_token_ids,
    ):
        # as the next replay of a CUDA graph does
        tensor.zero_()
    return judged


def test_verify_takes_the_sampled_rows():
    out = {"aurora_capture": False}
    reqs = [request("a"), request("b", custom_params=out), request("c", grammar=object())]
    capture = make_capture(topk_logits=5)
    judged = verify_step(capture, reqs)
    ((kind, snapshot, fields),) = capture.publisher.items
    assert (kind, fields["requests"]) == ("verify", ["a", "c"])
    assert fields["flags"] == [0, FLAG_ALTERED_DISTRIBUTION]
    assert (fields["draft_version"], fields["extend_version"]) == (3, 4)
    arrays = {name: array for name, (_, array) in snapshot.build().items()}
    assert arrays["positions"].tolist() == [10, 12]
    assert arrays["draft_tokens"].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert arrays["next_tokens"].tolist() == [[1, 2, 3], [9, 10, 11]]
    # of the logits as sampling left them
    expected = judged.view(3, N, V)[[0, 2]].topk(5)
    assert torch.equal(torch.from_numpy(arrays["topk_logits"]), expected.values)
    assert abs(arrays["aux_hidden_states"]).min() > 0
    assert capture.boundary.errors == 0 and sum(capture.boundary.seconds["verify"].counts) > 0


def test_nothing_is_offered_where_nobody_is_sampled():
    capture = make_capture(sample_rate=0.0)
    verify_step(capture, [request("a"), request("b")])
    assert capture.publisher.items == [] and capture.boundary.errors == 0


def prefill_step(capture, reqs, prefixes, extends, version=2):
    total = sum(extends)
    batch = SimpleNamespace(
        reqs=reqs, prefix_lens=prefixes, extend_lens=extends, input_ids=torch.arange(total) + 101,
        seq_lens=torch.tensor([p + e for p, e in zip(prefixes, extends)]),
    )  # fmt: skip
    hidden = torch.arange(total * F).view(total, F).float()
    result = SimpleNamespace(logits_output=SimpleNamespace(hidden_states=hidden))
    input_ids = torch.arange(total) + 100
    capture.prefill(batch, input_ids, result, version)
    for tensor in (hidden, input_ids, batch.input_ids, batch.seq_lens):
        tensor.zero_()


def test_without_a_buffer_nothing_is_computed():
    capture = make_capture()
    capture.transfer.has_room = lambda: False
    verify_step(capture, [request("a"), request("b")])
    prefill_step(capture, [request("a")], [0], [5])
    assert (
        capture.publisher.drops == ["no_buffer", "no_buffer"]
        and not capture.publisher.items
        and not capture.boundary.errors
    )


@pytest.mark.parametrize(
    ("change", "altered"),
    [
        ({}, False),
        ({"logit_bias": {"3": 1.0}}, False),
        ({"logit_bias": {}}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"presence_penalty": -0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"min_new_tokens": 2}, False),
        ({"rid": "watermarked"}, True),
        ({"grammar": object()}, True),
    ],
)
def test_flags(change, altered):
    """A mask or a watermark, of this row only: other rows of the batch are as they were."""
    capture = make_capture()
    verify_step(capture, [request("free"), request(**{"rid": "a", **change})])
    flag = FLAG_ALTERED_DISTRIBUTION if altered else 0
    assert capture.publisher.items[0][2]["flags"] == [0, flag]


@pytest.mark.parametrize(
    ("finished", "reason"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("abort", "abort"),
        (None, "retract"),
        ("something new", "abort"),
    ],
)
def test_end(finished, reason):
    capture = make_capture()
    capture.ended(request("a", range(5), output=range(7), finished=finished))
    ((kind, snapshot, fields),) = capture.publisher.items
    assert (kind, fields["requests"], fields["reasons"]) == ("end", ["a"], [reason])
    assert snapshot.build()["committed_lens"][1].tolist() == [12]


@pytest.mark.parametrize(
    ("label", "travels"),
    [
        ("code", True),
        ("a-b_C.9", True),
        ("x" * 33, False),
        ("a b", False),
        ("a\n", False),
        ("é", False),
        (7, False),
    ],
)
def test_a_requests_label_travels_where_it_is_short_and_harmless(label, travels):
    reqs = [request("a"), request("b", custom_params={"aurora_domain": label}, finished="stop")]
    capture = make_capture()
    prefill_step(capture, reqs, [0, 0], [5, 5])
    capture.ended(reqs[1])
    capture.ended(reqs[0])
    domains = [fields["domains"] for _, _, fields in capture.publisher.items]
    assert (
        domains == ([["", label], [label], []] if travels else [[], [], []])
        and not capture.boundary.errors
    )


def test_end_within_an_accepted_path():
    """output_ids may hold more than the client gets; finished_len is what it gets."""
    req = request("a", range(5), output=range(7), finished="stop")
    req.finished_len = 3
    capture = make_capture()
    capture.ended(req)
    assert capture.publisher.items[0][1].committed_len == 8


def test_failures_are_counted_and_never_raised(caplog):
    capture = make_capture()
    for _ in range(3):
        capture.before_verify(SimpleNamespace(reqs=None, seq_lens=None))
        capture.verify(None, None, None, 0, 0)
        capture.prefill(None, None, None, 0)
        capture.ended(None)
    assert capture.boundary.errors == 9 and capture.publisher.items == []
    assert sum("capture failed" in record.message for record in caplog.records) == 1


def test_what_fails_again_and_again_rests_and_tries_again_later(caplog):
    capture, now = make_capture(), 0.0
    capture.boundary = Boundary(KINDS, clock=lambda: now)
    broken = SimpleNamespace(reqs=None, seq_lens=None)

    def fail(times: int) -> None:
        for _ in range(times):
            capture.before_verify(broken)

    def taken(rid: str) -> bool:
        before = len(capture.publisher.items)
        verify_step(capture, [request(rid)])
        return len(capture.publisher.items) > before

    fail(2)
    assert taken("a")
    # three in a row, not in all
    fail(2)
    assert taken("b")
    fail(3)
    running = request("c")
    running.aurora_excluded = None
    verify_step(capture, [running])
    assert not taken("d") and capture.excluded == {"failing": 1}
    now = 61.0
    assert taken("e")
    # one proof ends it; without one, each rest is twice as long as the last
    fail(3)
    now += 59
    assert not taken("f")
    now += 2
    fail(1)
    now += 119
    assert not taken("g")
    now += 2
    assert taken("h")
    rests = [record.args[0] for record in caplog.records if "rests" in record.message]
    assert rests == [60, 60, 120]
    # a request that was left out once stays out
    assert capture.excluded == {"failing": 3}


def test_what_had_nothing_to_do_proves_nothing():
    """Neither a prefill of requests that are not captured, nor another part that works."""
    capture = make_capture()
    out = request("out", custom_params={"aurora_capture": False})
    for n in range(3):
        assert not capture.boundary.resting
        capture.before_verify(SimpleNamespace(reqs=None, seq_lens=None))
        prefill_step(capture, [out], [0], [2])
        prefill_step(capture, [request(f"in {n}")], [0], [2])
        capture.ended(out)
    assert capture.boundary.resting
