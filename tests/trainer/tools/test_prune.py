"""What is counted is what was generated; the counts choose one vocabulary for init-draft, export
and prune-vocab.
"""

import json

import pytest
import torch
import traffic
from models import make_random_draft, make_random_target
from safetensors.torch import load_file
from typer.testing import CliRunner

from aurora_sglang_plugin.link import wire
from aurora_trainer.cli import app
from aurora_trainer.drafts import vocab
from aurora_trainer.drafts.target import open_target
from aurora_trainer.recordings.recording import RecordConfig, Recording
from aurora_trainer.tools import prune

V = 64


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_random_target(
        tmp_path_factory.mktemp("target"), vocab=V, hidden=32, tokenizer=False
    )


@pytest.fixture
def messages(target):
    return list(traffic.messages(target="t", vocab=V - 8, features=96, requests=12, outputs=30))


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def generated(messages, eos):
    """Token by token, as a client reads it: what each verify step committed, up to an end of
    text.
    """
    counts = [0] * V
    for parts in messages:
        message = wire.decode(parts, max_bytes=1 << 30)
        if message.header.kind != "verify":
            continue
        for tokens, length in zip(
            message.arrays["next_tokens"], message.arrays["feature_lens"], strict=True
        ):
            for token in tokens[:length]:
                counts[token] += 1
                if token in eos:
                    break
    return counts


def test_counts_are_of_generated_tokens(messages, target):
    opened = open_target(target)
    counts = prune.count_messages(messages, opened)
    assert counts.shape == (2, V) and counts.sum(0).tolist() == generated(
        messages, opened.eos_token_ids
    )
    assert (counts.sum(1) > 0).all()


def test_nothing_counts_after_the_end_of_text(messages, target, tmp_path):
    """The commonest token made the end: everything behind it in a step is gone."""
    (commonest,) = (
        prune.count_messages(messages, open_target(target)).sum(0).topk(1).indices.tolist()
    )
    other = make_random_target(tmp_path / "t", vocab=V, hidden=32)
    config = json.loads((other / "config.json").read_text()) | {"eos_token_id": commonest}
    (other / "config.json").write_text(json.dumps(config))
    opened = open_target(other)
    counts = prune.count_messages(messages, opened).sum(0).tolist()
    assert opened.eos_token_ids[0] == commonest or commonest in opened.eos_token_ids
    assert counts == generated(messages, opened.eos_token_ids) and sum(counts) < sum(
        generated(messages, ())
    )


def test_coverage_by_hand(target):
    counts = torch.zeros(2, V, dtype=torch.int64)
    counts[0, [1, 2]] = torch.tensor([6, 2])
    counts[1, [1, 3]] = torch.tensor([1, 1])
    (eos,) = open_target(target).eos_token_ids
    # the end of text is always in
    two, three, all_ = prune.coverage(counts, [2, 3, V], open_target(target))
    assert (two.counted, three.counted, all_.counted) == (0.7, 0.9, 1.0)
    # token 1 leads in both halves
    assert two.held_out == pytest.approx((6 + 1) / 10)
    # 2 and 3 are each unknown to the other half
    assert three.held_out == pytest.approx((6 + 1) / 10)
    assert two.head_bytes == 2 * 32 * 4 and eos == V - 1
    with pytest.raises(ValueError, match="no generated token"):
        prune.coverage(torch.zeros(2, V, dtype=torch.int64), [2], open_target(target))


def test_one_way_to_choose_for_a_new_draft_and_for_one_that_is_there(messages, target, tmp_path):
    recording = Recording(tmp_path / "recording", RecordConfig())
    for parts in messages:
        recording.write(parts)
    recording.close()
    draft = make_random_draft(tmp_path / "draft", target, aux_layer_ids=[0, 2, 4])
    counts = tmp_path / "counts.json"
    code, said = run(
        "prune-vocab", target, "--recording", tmp_path / "recording", "--counts", counts, "--sizes",
        "16,64",
        "--draft", draft, "--draft-vocab", 16, "--out", tmp_path / "pruned",
    )  # fmt: skip
    assert code == 0, said
    assert "100.00%" in said and "vocabulary=16" in said
    assert (
        run(
            "export",
            draft,
            tmp_path / "exported",
            "--draft-vocab",
            16,
            "--counts",
            counts,
            "--keep",
            V - 1,
        )[0]
        == 0
    )
    new = [
        "init-draft",
        target,
        tmp_path / "new",
        "--kind",
        "random",
        "--draft-vocab",
        16,
        "--counts",
        counts,
    ]
    assert run(*new, "--aux-layers", "0,2,4")[0] == 0
    kept = [
        load_file(tmp_path / n / "model.safetensors")["d2t"] for n in ("pruned", "exported", "new")
    ]
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    assert V - 1 in vocab.target_ids(kept[0]).tolist()


def test_text_counts_with_the_targets_own_tokenizer(tmp_path):
    # bytes as tokens
    target = make_random_target(tmp_path / "t", vocab=300, hidden=32, tokenizer=True)
    (tmp_path / "a.txt").write_text("aab\nab\n")
    counts = prune.count_text([tmp_path / "a.txt"], open_target(target))
    assert sorted(counts.sum(0)[counts.sum(0) > 0].tolist()) == [2, 2, 3]
    assert counts.sum(1).tolist() == [4, 3]


def test_what_is_asked_for_must_be_whole(target, messages, tmp_path):
    assert "--recording or --text" in run("prune-vocab", target)[1]
    (tmp_path / "a.txt").write_text("a")
    text = ["prune-vocab", target, "--text", tmp_path / "a.txt"]
    assert "together" in run(*text, "--draft-vocab", 8)[1]
    assert "no tokenizer.json" in run(*text)[1]
    small = make_random_target(tmp_path / "small", vocab=32, hidden=32)
    with pytest.raises(ValueError, match="not its own"):
        prune.count_messages(messages, open_target(small))


def test_a_damaged_recording_is_counted_around_the_damage(messages, target, tmp_path):
    recording = Recording(tmp_path / "recording", RecordConfig())
    for parts in messages:
        recording.write(parts)
    recording.close()
    (file,) = (tmp_path / "recording").glob("*.trace")
    whole = json.loads(counted(target, tmp_path, "whole"))
    data = bytearray(file.read_bytes())
    # some of them in verify messages
    for place in range(1, 9):
        data[len(data) * place // 9] ^= 0xFF
    file.write_bytes(data)
    damaged = json.loads(counted(target, tmp_path, "damaged"))
    assert 0 < sum(damaged) < sum(whole)
    code, output = run("prune-vocab", target, "--recording", tmp_path / "recording")
    assert code == 0 and "damaged, counted without it" in output and "at byte" in output


def counted(target, tmp_path, name):
    code, output = run(
        "prune-vocab", target, "--recording", tmp_path / "recording", "--counts", tmp_path / name
    )
    assert code == 0, output
    return (tmp_path / name).read_text()
