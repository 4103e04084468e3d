"""The demo's target: its text, its tokens, its arithmetic, and that it learns."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import make_target  # noqa: E402
import text  # noqa: E402
from target_model import NextTokenLoss, TargetModel  # noqa: E402
from target_rows import batches, token_stream, train_tokenizer  # noqa: E402
from unloop import Unloop, repeats  # noqa: E402

TINY = replace(
    make_target.QUICK, steps=120, vocab_size=512, layers=4, hidden=64, intermediate=160, heads=1,
    batch_tokens=1024, context=512, row_tokens=128, text_bytes=150_000, unloop_from=0.95,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        [d for domain in text.DOMAINS for d in text.documents(domain, "train", 100_000)], 512
    )


@pytest.mark.parametrize("domain", text.DOMAINS)
def test_no_held_out_text_is_trained_on(domain):
    train, heldout = (
        {
            piece
            for document in text.documents(domain, split, 400_000)
            for piece in document.split("\n")
        }
        for split in ("train", "heldout")
    )
    assert len(train) > 500 and len(heldout) > 500
    if domain == "prose":
        assert train.isdisjoint(heldout)
    else:
        # files of code share lines such as `return self`, but no file is in both
        documents = [set(text.documents(domain, split, 400_000)) for split in ("train", "heldout")]
        assert documents[0].isdisjoint(documents[1])


def test_domains_differ():
    words = {}
    for domain in text.DOMAINS:
        sample = "".join(text.documents(domain, "heldout", 100_000))
        words[domain] = sum(letter.isalpha() for letter in sample) / len(sample)
    assert words["prose"] > words["code"] + 0.15


def test_tokenizer_gives_every_text_back(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for sample in (
        "def f(x):\n        return  x\t# é ∑ 日本\r\n",
        " leading, doubled  and trailing ",
        "\n\n\n",
    ):
        assert loaded.decode(loaded(sample)["input_ids"]) == sample
    assert len(loaded) == 512


def test_prompts_are_the_same_each_time_and_different_from_each_other(tokenizer):
    first = text.prompts("code", 50, 24, tokenizer, seed=3)
    assert first == text.prompts("code", 50, 24, tokenizer, seed=3)
    assert first != text.prompts("code", 50, 24, tokenizer, seed=4)
    assert {len(prompt) for prompt in first} == {24} and len(set(map(tuple, first))) > 45


def test_too_many_prompts_are_refused(tokenizer):
    with pytest.raises(ValueError, match="ask for fewer"):
        text.prompts("prose", 5, 1_000_000, tokenizer, seed=0)


def test_batches_cover_the_stream_once_a_pass():
    stream = torch.arange(33)
    rows = batches(stream, 16, 8, lambda: 4, torch.Generator().manual_seed(1))
    batch = next(rows)
    assert batch.shape == (4, 5) and (batch[:, 1:] == batch[:, :-1] + 1).all()
    assert len(batch[:, :-1].unique()) == 16


def test_repeats_are_the_ngrams_seen_before():
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8]])
    assert repeats(ids, start=0, n=2).tolist()[0] == [False] * 4 + [True] * 4
    assert repeats(ids, start=6, n=2).tolist()[0] == [False] * 6 + [True] * 2
    assert not repeats(ids, start=0, n=2)[1].any()


def test_unloop_lowers_what_was_repeated():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = TargetModel(config, torch.float32)
    with torch.no_grad():
        # sure of itself, so that it loops
        model.head.mul_(10)
    unloop = Unloop(model, torch.arange(200) % 32, torch.Generator().manual_seed(0))
    before, weights = unloop.loss(), list(model.weights.values())
    assert unloop.share() > 0.2 and before > 0
    for weight, gradient in zip(
        weights, torch.autograd.grad(before, weights, allow_unused=True), strict=True
    ):
        if gradient is not None:
            weight.data -= 0.1 * gradient
    assert unloop.loss() < before


def test_loss_and_gradients_against_autograd():
    torch.manual_seed(0)
    hidden, head = torch.randn(2500, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels, avoid = torch.randint(11, (2500,)), torch.rand(2500) < 0.3
    p = (hidden @ head.T).softmax(-1).gather(1, labels[:, None])[:, 0]
    # beyond it the pull is bounded, on purpose
    keep = ~avoid | (p < 0.95)
    avoid, labels = avoid[keep], labels[keep]
    rows = hidden[keep]
    p = (rows @ head.T).softmax(-1).gather(1, labels[:, None])[:, 0]
    expected = torch.where(avoid, -torch.log1p(-p), -p.log()).mean()
    ours = NextTokenLoss.apply(rows, head, labels, avoid)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (hidden, head), retain_graph=True),
        torch.autograd.grad(expected, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tied", (True, False))
def test_model_is_hugging_faces_qwen3(tied):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied,
    )  # fmt: skip
    model = TargetModel(config, torch.float32)
    for weight in model.weights.values():
        # the norms start as ones, some projections as zeros
        weight.data += 0.1 * torch.randn_like(weight)
    reference = AutoModelForCausalLM.from_config(config)
    reference.load_state_dict(
        {name: weight.detach() for name, weight in model.weights.items()}, strict=False
    )
    reference.tie_weights()
    ids = torch.randint(64, (3, 17))
    torch.testing.assert_close(
        model(ids) @ model.head.T, reference(ids).logits, rtol=1e-4, atol=1e-5
    )


def test_a_few_steps_of_training_beat_the_unigram(tmp_path):
    directory = tmp_path / "target"
    make_target.make(TINY, directory)
    assert make_target.is_ready(TINY, directory)
    assert not make_target.is_ready(replace(TINY, seed=1), directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", "target.lock"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    stream = token_stream(tokenizer, text.documents("code", "heldout", 30_000))[:4096].view(8, 512)
    with torch.no_grad():
        loss = model(stream, labels=stream).loss.item()
    counts = torch.bincount(stream.flatten(), minlength=512).double()
    share = counts[counts > 0] / counts.sum()
    # of this very text: the best that word counts could do
    unigram = -(share * share.log()).sum().item()
    assert loss < unigram
    report = json.loads((directory / "target.json").read_text())
    assert (
        report["code"]["perplexity"] < math.exp(unigram)
        and 0 < report["prose"]["distinct_4grams"] <= 1
    )


def test_the_demos_target_is_what_the_script_makes():
    """Made by the default recipe, but for the time that it was given, and a few megabytes."""
    directory = Path(make_target.__file__).with_name("target")
    report = json.loads((directory / "target.json").read_text())
    made = asdict(replace(make_target.Recipe(), minutes=report["recipe"]["minutes"]))
    assert report["recipe"] == made
    assert sum(file.stat().st_size for file in directory.iterdir()) < 7 << 20
    assert math.exp(held_out_loss(directory)) < 1.5 * report["code"]["perplexity"]


def held_out_loss(directory: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    stream = token_stream(tokenizer, text.documents("code", "heldout", 30_000))[:4096].view(8, 512)
    with torch.no_grad():
        return model(stream, labels=stream).loss.item()
