"""Whatever decodes is assembled, packed, trained on and walked: random mutations of valid messages
either are refused by the contract, or go all the way to a finite loss and a walk. And the requests
that were not mutated are whole."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from traffic import HIDDEN, VOCAB, messages
from trainer_process import config

from aurora_sglang_plugin.link import rows, wire
from aurora_trainer.daemon import Daemon
from aurora_trainer.drafts.batch import pack
from aurora_trainer.intake.assemble import AssembleConfig, Assembler
from aurora_trainer.intake.buffer import Buffer, BufferConfig
from aurora_trainer.intake.usable import unusable
from aurora_trainer.learn.accept_length import measure
from aurora_trainer.learn.objective import losses

MAX = 1 << 20
HUGE = [-(2**31), -2, -1, 0, 1, 2, 17, 64, 255, 2**24, 2**31 - 1]
FLOATS = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e12, -1e5, 0.0, 50.0]
FIELDS = {
    "num_steps": HUGE + [10**6],
    "topk": HUGE + [10**6],
    "draft_version": HUGE,
    "extend_version": HUGE,
    "time_ns": [0, 1, 2**63 - 1, 2**63],
    "captured_seq": HUGE,
    "flags": [[], [-1], [2**62], [0, 0]],
    "requests": [[], ["x" * 2000], [""], ["é\n\0"], ["e-0", "e-0"]],
    "domains": [[], ["x" * 40], ["code"], ["a", "b"]],
    "reasons": [[], ["retract"], ["stop", "stop"]],
    "frames": [[]],
}


@pytest.fixture(scope="module")
def training(models, tmp_path_factory):
    return Daemon(config(models, tmp_path_factory.mktemp("fuzz"))).training


@pytest.fixture(scope="module")
def stream(training):
    """Parts of two requests, the second one's messages between the first one's; only the first is
    mutated.
    """
    about = dict(target=training.target, vocab=VOCAB, features=3 * HIDDEN, requests=1, outputs=9)
    first, second = (
        list(messages(session=name, seed=seed, **about)) for seed, name in enumerate("ef")
    )
    found = []
    for pair in zip(first, second):
        found += pair
    found += [*first[len(second) :], *second[len(first) :]]
    return [
        (number, session(parts), renumbered(parts, number)) for number, parts in enumerate(found, 1)
    ]


def session(parts):
    return msgspec.msgpack.decode(parts[0])["session"]


def renumbered(parts, number):
    header = msgspec.msgpack.decode(parts[0]) | {
        "session": "e",
        "captured_seq": number,
        "sent_seq": number,
    }
    return [msgspec.msgpack.encode(header), *parts[1:]]


def mutated(parts, draw):
    """One change: a byte, a field of the header, values of a frame, or the size of a dimension in
    all frames.
    """
    header, frames = msgspec.msgpack.decode(parts[0]), [bytearray(p) for p in parts[1:]]
    how = draw(st.sampled_from(["byte", "field", "values", "dimension"]))
    if how == "byte":
        part = draw(st.integers(0, len(frames)))
        changed = bytearray(parts[part])
        if changed:
            changed[draw(st.integers(0, len(changed) - 1))] ^= draw(st.integers(1, 255))
        return [*parts[:part], bytes(changed), *parts[part + 1 :]]
    if how == "field":
        name = draw(st.sampled_from(sorted(FIELDS)))
        return [
            msgspec.msgpack.encode(header | {name: draw(st.sampled_from(FIELDS[name]))}),
            *parts[1:],
        ]
    at = draw(st.integers(0, len(frames) - 1))
    name, dtype, shape = header["frames"][at].values()
    array = np.frombuffer(parts[1 + at], wire.DTYPES[dtype]).reshape(shape).copy()
    if how == "values" and array.size:
        flat, values = array.reshape(-1), FLOATS if dtype == "float32" else HUGE
        for _ in range(draw(st.integers(1, 4))):
            flat[draw(st.integers(0, flat.size - 1))] = np.array(
                draw(st.sampled_from(values))
            ).astype(array.dtype)
        if draw(st.booleans()):
            flat[:] = np.array(draw(st.sampled_from(values))).astype(array.dtype)
        return [*parts[: 1 + at], array.tobytes(), *parts[2 + at :]]
    letters = wire.FRAMES[header["kind"]][name][1]
    letter, size = (
        draw(st.sampled_from(letters)),
        draw(st.sampled_from([0, 1, 2, 3, 5, 16, 64, 65, 130])),
    )
    new = []
    for frame, part in zip(header["frames"], parts[1:]):
        letters = wire.FRAMES[header["kind"]][frame["name"]][1]
        array = np.frombuffer(part, wire.DTYPES[frame["dtype"]]).reshape(frame["shape"])
        if letter in letters and array.shape[letters.index(letter)]:
            axis = letters.index(letter)
            array = np.take(array, np.arange(size) % array.shape[axis], axis)
        frame["shape"] = array.shape
        new.append(array.tobytes())
    if letter == "B":
        header |= {n: header[n] * size for n in ("requests", "flags", "reasons") if header.get(n)}
    if letter == "P":
        header["num_steps"] = size - 1
    return [msgspec.msgpack.encode(header), *new]


def cause(training, sample):
    config = training.draft.config
    return unusable(sample, config.feature_size, config.vocab_size, Counter())


@settings(max_examples=60, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(st.data())
def test_what_decodes_trains(training, stream, data):
    assembler, buffer = (
        Assembler(AssembleConfig(part_positions=8, context_positions=3)),
        Buffer(BufferConfig()),
    )
    own = st.sampled_from([number for number, session, _ in stream if session == "e"])
    wanted = data.draw(st.sets(own, min_size=1, max_size=2))
    samples = []
    for number, _, parts in stream:
        if number in wanted:
            parts = mutated(parts, data.draw)
        try:
            message = wire.decode(parts, max_bytes=MAX)
        except wire.WireError as error:
            if error.header is None:
                continue
            message = wire.decode([bytes(p) for p in wire.missing(error.header)], max_bytes=MAX)
        assert set(message.bad.values()) <= set(rows.CAUSES)
        samples += assembler.add(message)
    samples += assembler.idle(0.0) + assembler.idle(1e9)
    assert assembler.open_requests == assembler.nbytes == 0 and not assembler._held
    samples = [sample for sample in samples if cause(training, sample) is None]
    for sample in samples:
        buffer.put(sample)
    if samples:
        batch = pack(buffer.take(1 << 20), training.learner.packing)
        loss = losses(training.draft, batch, training.config.trainer.loss).loss_sum
        loss.backward()
        gradients = [p.grad for p in training.draft.parameters() if p.grad is not None]
        assert bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in gradients)
        training.draft.zero_grad(set_to_none=True)
        trainer = training.config.trainer
        walked = measure(training.served.draft, samples, trainer.batch, trainer.loss, "cpu")
        assert np.isfinite(walked).all() and (walked[:, 1] >= walked[:, 0]).all()
    other = [s for s in samples if s.request == "f-0"]
    if assembler.counters["holes"] == 0 and other:
        assert sum(int((s.position_node >= 0).sum()) for s in other) > 4


def test_the_unmutated_stream_is_learnt(training, stream):
    assembler = Assembler(AssembleConfig(part_positions=8, context_positions=3))
    samples = [
        s for _, _, parts in stream for s in assembler.add(wire.decode(parts, max_bytes=MAX))
    ]
    assert {s.request for s in samples} == {"e-0", "f-0"} and not assembler.bad_rows
    assert all(cause(training, s) is None for s in samples) and torch.is_grad_enabled()
