"""`inspect`: what it says of each thing is what is there, damage is named, and nothing reaches a
terminal unescaped.
"""

import json

import pytest
import torch
from models import make_random_draft, make_random_target
from traffic import S, messages
from typer.testing import CliRunner

from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.weights.writer import WeightsWriter
from aurora_trainer.checkpoint import save_checkpoint
from aurora_trainer.cli import app
from aurora_trainer.recordings.recording import RecordConfig, Recording
from aurora_trainer.terminal import columns, escape, ranges, size
from aurora_trainer.tools.describe import describe, problems

EVIL = "\x1b[2Jname\u202e\n"


@pytest.fixture
def recording(tmp_path):
    writer = Recording(tmp_path / "r", RecordConfig(file_bytes=50_000, max_bytes=1 << 30))
    for session, domain in (("a", "code"), ("b", "")):
        for parts in messages(
            target="t", vocab=64, features=96, requests=5, session=session, domain=domain
        ):
            writer.write(parts)
    writer.close()
    return tmp_path / "r"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    make_random_target(directory / "target", vocab=64, hidden=32, tokenizer=False)
    make_random_draft(directory / "draft", directory / "target", aux_layer_ids=[0, 2, 4])
    return directory


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_a_recording_in_figures(recording):
    found, text = describe(recording)
    sent = [
        wire.decode(p, max_bytes=1 << 30)
        for p in messages(target="t", vocab=64, features=96, requests=5)
    ]
    lengths = [int(m.arrays["feature_lens"][0]) for m in sent if m.header.kind == "verify"]
    assert (
        found["requests"] == 10
        and found["domains"] == {"code": 5}
        and found["ends"] == {"length": 10}
    )
    assert found["steps"] == 2 * len(lengths) and found["tokens"] == 2 * sum(lengths)
    assert found["accept_length"] == pytest.approx(sum(lengths) / len(lengths))
    for k, share in enumerate(found["accepted_at_least"]):
        assert share == pytest.approx(sum(n > k + 1 for n in lengths) / len(lengths))
    assert len(found["accepted_at_least"]) == S and found["messages"]["end"]["count"] == 10
    assert found["files"] > 2 and found["damaged"] == [] and set(found["servers"]) == {"a", "b"}
    assert f"accept length {found['accept_length']:.3f}" in text and "code 5" in text
    assert run(recording).exit_code == 0
    assert json.loads(run(recording, "--json").stdout) == json.loads(json.dumps(found))


def test_gaps_and_damage_of_a_recording(recording):
    files = sorted(recording.glob("*.trace"))
    files[1].unlink()
    data = bytearray(files[0].read_bytes())
    data[2000] ^= 1
    files[0].write_bytes(data)
    found, text = describe(recording)
    lost = sum(s["lost"] for s in found["servers"].values())
    assert lost > 1 and len(found["damaged"]) == 2 == problems(found)
    assert str(files[0]) in text and str(files[1]) in text and "at byte" in text
    assert run(recording).exit_code == 1


def test_a_message_with_its_trees(recording):
    result = run(recording, "--message", "1", "--top", "2")
    assert result.exit_code == 0, result.output
    for word in (
        "verify message",
        "record 1 at byte",
        "a-0",
        "draft_tokens",
        "* ",
        "bonus",
        "target ",
    ):
        assert word in result.output, word
    found = json.loads(run(recording, "--message", "1", "--json").stdout)
    assert found["header"]["sent_seq"] == 2 and len(found["trees"]) == 1
    assert run(recording, "--message", "100000").exit_code == 2
    assert run(recording, "--message", "1", "--tokenizer", recording).exit_code == 2


def test_tokens_are_named_by_the_tokenizer(recording, tmp_path):
    from tokenizers import Tokenizer, decoders, models

    vocab = {f"t{n}\x1b": n for n in range(64)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0\x1b"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    output = run(recording, "--message", "1", "--tokenizer", tmp_path).output
    assert '"t' in output and "\\x1b" in output and "\x1b" not in output


def test_what_came_over_the_wire_is_escaped(tmp_path):
    writer = Recording(tmp_path / "r", RecordConfig())
    for parts in messages(target=EVIL, vocab=64, features=96, requests=1, session=EVIL):
        writer.write(parts)
    writer.close()
    for arguments in ([], ["--message", "1"], ["--json"], ["--message", "1", "--json"]):
        output = run(tmp_path / "r", *arguments).output
        assert not set(output) & {"\x1b", "\u202e"} and "name" in output
    assert escape("a\x9b\u2066b") == "a\\x9b\\u2066b" and escape("x" * 300, 10) == "xxxxx…xxxxx"


def test_a_weights_directory(models, tmp_path):
    writer = WeightsWriter(tmp_path / "w")
    config = json.loads((models / "draft" / "config.json").read_text())
    for n in range(3):
        gate = {"reason": "better", "candidate": 2.5}
        writer.publish(
            {"x": torch.full((n + 2, 3), 1.0)},
            config,
            target="t",
            parent=n,
            optimizer_step=7,
            gate=gate,
        )
    writer.close()
    (tmp_path / "w" / "REJECTED").write_text('{"version": 2}\n')
    found, text = describe(tmp_path / "w")
    assert (found["current"], found["rejected"], problems(found)) == (3, [2], 0)
    newest = found["versions"][-1]
    assert (newest["parent"], newest["parameters"], newest["gate"]["candidate"]) == (2, 12, 2.5)
    assert "CURRENT" in text and "REJECTED" in text and "candidate=2.5" in text
    one, text = describe(tmp_path / "w" / "v000002")
    assert one == found["versions"][1] and "sha256" in text
    weights = tmp_path / "w" / "v000001" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = run(tmp_path / "w")
    assert (
        result.exit_code == 1 and "DAMAGED" in result.output and "sha256 differs" in result.output
    )
    (tmp_path / "w" / "CURRENT").write_text("v000009\n")
    assert "which is not there" in run(tmp_path / "w").output


def test_checkpoints(tmp_path):
    tensors = {
        "draft/a": torch.zeros(2, 3),
        "optimizer/m/a": torch.zeros(2, 3),
        "optimizer/m/b": torch.zeros(4),
    }
    for step in (3, 5):
        save_checkpoint(
            tmp_path,
            step,
            tensors,
            {"steps": step, "optimizer": {"updates": step}, "long": []},
            keep=3,
        )
    found, text = describe(tmp_path)
    first, last = found["checkpoints"]
    assert (first["step"], last["step"]) == (3, 5) and problems(found) == 0
    assert last["tensors"]["optimizer/m"]["parameters"] == 10 and last["state"]["optimizer"] == {
        "updates": 5
    }
    assert "updates=5" in text and "step 5" in text
    assert describe(tmp_path / "step-00000003")[0]["checkpoints"] == [first]
    (tmp_path / "step-00000005" / "state.json").write_text("{}")
    assert run(tmp_path).exit_code == 1


def test_a_draft_and_what_is_none(models, tmp_path):
    found, text = describe(models / "draft")
    assert found["kind"] == "draft" and "lm_head.weight" in found["tensors"] and "fc.weight" in text
    both = run(models / "draft", models / "draft", "--json").stdout.splitlines()
    assert [json.loads(line)["kind"] for line in both] == ["draft", "draft"]
    for path in (tmp_path, tmp_path / "nowhere", models):
        result = run(path)
        assert result.exit_code == 2 and "neither a recording" in result.output


def test_small_things():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8" and ranges([]) == ""
    assert size(999) == "999 B" and size(1_600_000) == "1.6 MB"
    # brackets are no markup, wide characters take two places, nothing is cut
    long = "x" * 300
    rows = [["[red]a", "1"], ["\u6f22\u5b57\u6f22\u5b57", "22"], [long, ""]]
    assert columns(["name", "n"], rows) == [
        f"name{' ' * 296}  n", f"[red]a{' ' * 294}  1", f"\u6f22\u5b57\u6f22\u5b57{' ' * 292}  22",
        long,
    ]  # fmt: skip
    assert columns(["n"], [["1"], ["22"]], "right") == [" n", " 1", "22"]
