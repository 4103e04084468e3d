"""Weights out: every kind of source, the same bits, whole or not at all; pruning takes rows and
nothing else.
"""

import json

import pytest
import torch
from models import make_random_draft, make_random_target
from safetensors.torch import load_file
from typer.testing import CliRunner

from aurora_sglang_plugin.drafts.eagle3_check import check_draft
from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_sglang_plugin.weights.writer import WeightsWriter
from aurora_trainer.checkpoint import save_checkpoint
from aurora_trainer.cli import app
from aurora_trainer.drafts import eagle3_export as export
from aurora_trainer.drafts import vocab
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_import import import_draft
from aurora_trainer.drafts.target import open_target

V, VD, AUX = 64, 40, [0, 2, 4]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_random_target(tmp_path_factory.mktemp("target"), vocab=V, hidden=32)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def published(request, target, tmp_path):
    """(weights directory, the tensors of its version 2), of a draft with a reduced vocabulary."""
    embed = open_target(target).embedding()
    writer = WeightsWriter(tmp_path / "weights")
    for seed in (1, 2):
        folder = make_random_draft(
            tmp_path / f"d{seed}", target, draft_vocab=VD, aux_layer_ids=AUX, seed=seed
        )
        draft = Draft.load(folder, embed)
        tensors, name = draft.checkpoint(request.param), str(request.param).removeprefix("torch.")
        fingerprint = target_fingerprint(str(target))
        writer.publish(
            tensors, draft.config.to_json(name), target=fingerprint, parent=0, optimizer_step=seed
        )
    writer.close()
    return tmp_path / "weights", tensors


def canonical(directory):
    return {
        n.replace("midlayer.", "layers.0."): t
        for n, t in load_file(directory / "model.safetensors").items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def test_published_exported_imported_and_loaded_it_has_the_same_bits(published, target, tmp_path):
    weights, tensors = published
    assert run("export", weights, tmp_path / "out")[0] == 0
    assert same(canonical(tmp_path / "out"), tensors)
    assert any(n.startswith("midlayer.") for n in load_file(tmp_path / "out" / "model.safetensors"))
    check_draft(tmp_path / "out", open_target(target).config)

    import_draft(tmp_path / "out", tmp_path / "back", str(target))
    assert same(canonical(tmp_path / "back"), tensors)
    draft = Draft.load(tmp_path / "back", open_target(target).embedding())
    assert same(draft.checkpoint(tensors["fc.weight"].dtype), tensors)
    again = export.read_weights(tmp_path / "back")
    assert again.config == export.read_weights(
        weights
    ).config and again.config.aux_layer_ids == tuple(AUX)


def test_the_config_is_for_every_reader(published, tmp_path):
    export.write_draft(export.read_weights(published[0]), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        config["architectures"] == ["LlamaForCausalLMEagle3"] and config["draft_vocab_size"] == VD
    )
    # SGLang: outputs
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == AUX
    # vLLM: what enters
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 5]
    assert config["torch_dtype"] == config["dtype"] and config["norm_before_residual"] is False
    assert config["aurora"]["version"] == 2 and config["aurora"]["optimizer_step"] == 2


def test_an_older_version_a_versions_directory_and_a_draft_directory(published, tmp_path):
    weights, tensors = published
    assert run("export", weights, tmp_path / "one", "--version", 1)[0] == 0
    assert not same(canonical(tmp_path / "one"), tensors)
    assert run("export", weights / "v000002", tmp_path / "two")[0] == 0 and same(
        canonical(tmp_path / "two"), tensors
    )
    assert run("export", tmp_path / "two", tmp_path / "three")[0] == 0 and same(
        canonical(tmp_path / "three"), tensors
    )
    code, said = run("export", weights, tmp_path / "nine", "--version", 9)
    assert code == 2 and "no version 9; there are: 1, 2" in said


def test_a_checkpoint_has_what_would_have_been_published(target, tmp_path):
    """float32 masters of a bfloat16 draft: as its servers hold it, or as they are."""
    embed = open_target(target).embedding()
    initial = Draft.load(
        make_random_draft(tmp_path / "d", target, draft_vocab=VD, aux_layer_ids=AUX), embed
    )
    initial.save(tmp_path / "initial", torch.bfloat16)
    trained = Draft.load(
        make_random_draft(tmp_path / "e", target, draft_vocab=VD, aux_layer_ids=AUX), embed
    )
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.001
    masters = {
        f"optimizer/master.{n}": p.detach()
        for n, p in trained.named_parameters()
        if p.requires_grad
    }
    computed = {f"draft/{n}": p.detach().bfloat16() for n, p in trained.named_parameters()}
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(
        tmp_path / "checkpoints", 7, computed | masters, {"steps": 7, "target": "t"}, keep=2
    )

    arguments = ["--draft", tmp_path / "initial"]
    assert run("export", tmp_path / "checkpoints", tmp_path / "a", *arguments)[0] == 0
    assert same(canonical(tmp_path / "a"), trained.checkpoint(torch.bfloat16))
    step = tmp_path / "checkpoints" / "step-00000007"
    assert run("export", step, tmp_path / "b", *arguments, "--dtype", "float32")[0] == 0
    assert same(canonical(tmp_path / "b"), trained.checkpoint(torch.float32))

    assert "--draft" in run("export", step, tmp_path / "c")[1]
    other = make_random_draft(tmp_path / "other", target, aux_layer_ids=AUX)
    assert "not trained from" in run("export", step, tmp_path / "c", "--draft", other)[1]
    (step / "state.safetensors").write_bytes(b"x")
    assert "cannot be read" in run("export", step, tmp_path / "c", *arguments)[1]


def test_pruning_keeps_rows_and_their_tokens(published, tmp_path):
    weights, tensors = published
    own = vocab.target_ids(tensors["d2t"])
    # the last ids are the most frequent
    counts = torch.arange(V).tolist()
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    keep = int(own[0])
    arguments = ["--draft-vocab", 10, "--counts", tmp_path / "counts.json", "--keep", keep]
    assert run("export", weights, tmp_path / "out", *arguments)[0] == 0
    pruned = canonical(tmp_path / "out")
    ids = vocab.target_ids(pruned["d2t"])
    assert ids.tolist() == sorted([keep, *own[-9:].tolist()])
    assert torch.equal(pruned["lm_head.weight"], tensors["lm_head.weight"][torch.isin(own, ids)])
    assert torch.equal(pruned["t2d"].nonzero()[:, 0], ids) and pruned["t2d"].shape == (V,)
    rest = {n for n in tensors if n not in ("lm_head.weight", "d2t", "t2d")}
    assert all(torch.equal(pruned[n], tensors[n]) for n in rest)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["draft_vocab_size"] == 10

    (tmp_path / "ids.json").write_text(json.dumps(own[[5, 3]].tolist()))
    assert run("export", weights, tmp_path / "ids", "--ids", tmp_path / "ids.json")[0] == 0
    assert vocab.target_ids(canonical(tmp_path / "ids")["d2t"]).tolist() == own[[3, 5]].tolist()


def test_what_cannot_be_pruned(published, tmp_path):
    weights = export.read_weights(published[0])
    absent = int((~published[1]["t2d"]).nonzero()[0])
    for ids in ([absent], [V], [-1], []):
        with pytest.raises(ValueError, match="vocabulary"):
            export.prune(weights, torch.tensor(ids, dtype=torch.int64))
    with pytest.raises(ValueError, match="pruning only removes"):
        export.most_frequent(weights, torch.ones(V), VD + 1)
    with pytest.raises(ValueError, match="counts of 3"):
        export.most_frequent(weights, torch.ones(3), 2)
    (tmp_path / "counts.json").write_text("[1, -2]")
    arguments = ["--draft-vocab", 10, "--counts", tmp_path / "counts.json"]
    assert "JSON list" in run("export", published[0], tmp_path / "out", *arguments)[1]
    assert run("export", published[0], tmp_path / "out", "--draft-vocab", 10)[0] == 2


def test_nothing_is_overwritten_unasked_and_a_failure_leaves_the_old(
    published, tmp_path, monkeypatch
):
    out, tensors = tmp_path / "out", published[1]
    (out / "empty").mkdir(parents=True)
    code, said = run("export", published[0], out)
    assert code == 2 and "--force" in said and [p.name for p in out.iterdir()] == ["empty"]
    assert run("export", published[0], out, "--force")[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setattr(
        export, "remove_directory", lambda path: (_ for _ in ()).throw(OSError("disk"))
    )
    assert run("export", published[0], out, "--force", "--version", 1)[0] == 2
    assert same(canonical(out), tensors) and not list(tmp_path.glob("*.tmp-*"))


def test_damage_and_nonsense(published, tmp_path):
    assert "neither a weights directory" in run("export", tmp_path, tmp_path / "out")[1]
    assert "no weights directory" in run("export", tmp_path, tmp_path / "out", "--version", 1)[1]
    assert "--dtype" in run("export", published[0], tmp_path / "out", "--dtype", "int8")[1]
    file = published[0] / "v000002" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, said = run("export", published[0], tmp_path / "out")
    assert (
        code == 2
        and "not the file that its manifest describes" in said
        and not (tmp_path / "out").exists()
    )
