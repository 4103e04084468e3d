"""Evaluation: walks are those of a draft computed token by token, figures are ratios with honest
intervals.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import make_random_target
from naive_draft import VARIANTS, Naive, make
from random_sample import random_sample
from traffic import HIDDEN, VOCAB, messages
from typer.testing import CliRunner

from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_trainer.cli import app
from aurora_trainer.drafts.eagle3_init import init_draft
from aurora_trainer.lab.evaluate import Evaluation, Request, _evaluate, evaluate
from aurora_trainer.lab.evaluation_report import picture, report, table
from aurora_trainer.recordings.recording import RecordConfig, Recording


@pytest.fixture(scope="module")
def recording(models, tmp_path_factory):
    """Code that the trained draft has seen alike, and prose whose session has requests of its
    own.
    """
    directory = tmp_path_factory.mktemp("recording") / "r"
    writer = Recording(directory, RecordConfig(file_bytes=100_000, max_bytes=1 << 30))
    about = dict(target=target_fingerprint(models / "target"), vocab=VOCAB, features=3 * HIDDEN)
    for session, domain, requests in (("a", "code", 40), ("b", "prose", 20), ("c", "", 10)):
        for parts in messages(
            **about, session=session, domain=domain, requests=requests, seed=len(domain)
        ):
            writer.write(parts)
    writer.close()
    return directory


@pytest.fixture(scope="module")
def trained(models, recording, tmp_path_factory):
    """The weights directory of a replay."""
    site = tmp_path_factory.mktemp("site")
    config = site / "aurora.toml"
    config.write_text(f"""
[weights]
directory = "{site}/weights"
[trainer.model]
target = "{models}/target"
draft = "{models}/draft"
[trainer.pace]
new_positions_per_step = 20
nice = 0
[trainer.batch]
max_positions = 256
[trainer.optimizer]
lr = 4e-3
[trainer.checkpoint]
directory = "{site}/checkpoints"
""")
    result = CliRunner().invoke(app, ["replay", str(recording), "--config", str(config)])
    assert result.exit_code == 0, result.output
    return site / "weights"


def naive_runs(draft, sample, depth):
    """Accept length of a greedy chain from each position, None if it is not known to its end."""
    naive, runs = Naive(draft), {}
    length, tokens = len(sample.features), sample.tokens.tolist()
    cache = [[] for _ in range(draft.config.num_hidden_layers)]
    for i in range(length):
        feature = sample.features[i].double()
        state, logits, cache = naive.step(
            tokens[i + 1], naive.project(feature), sample.start + i, cache
        )
        if i < sample.prompt_len - 1 - sample.start:
            continue
        known = [i + d < length - 1 and int(sample.position_node[i + d]) >= 0 for d in range(depth)]
        if not all(known):
            continue
        run, at = 1, (state, logits, cache)
        for d in range(depth):
            token = int(at[1].argmax())
            token += int(draft.d2t[token])
            if token != tokens[i + 2 + d]:
                break
            run += 1
            at = naive.step(token, naive.carried(at[0]), sample.start + i + d + 1, at[2])
        runs[i] = run
    return runs


@pytest.mark.parametrize("name", ["plain", "reduced vocabulary", "norm_output"])
def test_walks_are_those_of_the_draft_computed_token_by_token(name):
    draft, depth, result = make(VARIANTS[name]), 3, Evaluation(Path(), ["d"], "t", 3)
    requests = {}
    samples = [
        random_sample(seed, verifies=12, topk=1, num_steps=3, start=seed % 2 * 2)
        for seed in range(6)
    ]
    # tokens that the draft would have chosen, so that runs are of every length
    for sample in samples:
        sample.features = sample.features.double()
        torch.manual_seed(0)
        agree(draft, sample)
        # a tree hung from the last position too, whose own next token is not committed
        sample.position_node[-1] = 0
    _evaluate(samples, [draft], "cpu", result, requests)
    seen = set()
    for sample in samples:
        runs, at, steps, tokens = naive_runs(draft, sample, depth), None, 0, 0
        roots = sorted(sample.node_position[sample.tree_first].tolist())
        while (at := next((r for r in roots if r in runs and r >= (at or 0)), None)) is not None:
            while at in runs:
                steps, tokens, at = steps + 1, tokens + runs[at], at + runs[at]
                seen.add(runs.get(at))
        request = requests["e", sample.request]
        assert (request.chains[0, 0, -1], request.chains[0, 1, -1]) == (steps, tokens) and steps > 0
        assert request.served[0].tolist() == [steps, tokens]
    assert {1, 2} <= seen


def agree(draft, sample):
    """Replace most committed tokens by what the draft would choose after what is before them."""
    naive, cache = Naive(draft), [[] for _ in range(draft.config.num_hidden_layers)]
    for i in range(len(sample.features)):
        feature = sample.features[i].double()
        _, logits, cache = naive.step(
            int(sample.tokens[i + 1]), naive.project(feature), sample.start + i, cache
        )
        choice = int(logits.argmax())
        if i + 2 < len(sample.tokens) and torch.rand(()) < 0.7:
            sample.tokens[i + 2] = choice + int(draft.d2t[choice])


def test_live_counts_the_servers_steps_and_not_the_last_ones():
    sample, result, requests = (
        random_sample(3, verifies=9, topk=1, num_steps=2),
        Evaluation(Path(), ["d"], "t", 2),
        {},
    )
    _evaluate([sample], [make(VARIANTS["plain"], torch.float32)], "cpu", result, requests)
    steps = tokens = 0
    for first, last in zip(
        sample.tree_first.tolist(), [*sample.tree_first.tolist()[1:], len(sample.node_token)]
    ):
        if int(sample.node_position[first]) + 1 + 2 < len(sample.tokens) - 1:
            steps, tokens = steps + 1, tokens + int(sample.node_accepted[first:last].sum())
    assert requests["e", sample.request].live.tolist() == [steps, tokens] and 0 < steps < 9


def made_up(pairs, drafts=("a", "b")):
    """An evaluation of depth 1 from (domain, steps, tokens of a, tokens of b)."""
    found = Evaluation(Path("r"), list(drafts), "t", 1, (1, 1, 0))
    for domain, steps, *tokens in pairs:
        chains, served = np.zeros((len(tokens), 6, 1)), np.array([[steps, of] for of in tokens])
        chains[:, 0], chains[:, 1, 0] = steps, tokens
        found.requests.append(
            Request(domain, served, chains, np.ones((len(tokens), 2)), np.array([steps, tokens[0]]))
        )
    return found


def test_intervals_are_of_ratios_and_differences_are_paired():
    random = np.random.default_rng(0)
    # requests differ much more than drafts do
    hard = random.uniform(1, 3, 400)
    pairs = [
        ("x" if n % 2 else "y", 10, 10 * h, 10 * h + 0.5 + random.normal(0, 0.3))
        for n, h in enumerate(hard)
    ]
    figures = report(made_up(pairs))
    of = figures["domains"]["all"]
    a, b, difference = (
        *(of["drafts"][name]["accept_length"] for name in "ab"),
        of["differences"]["b - a"],
    )
    assert a["mean"] == pytest.approx(hard.mean(), abs=1e-5)
    # by themselves they could be equal
    assert b["low"] < a["high"]
    # paired, they are not
    assert 0.03 < difference["low"] < 0.05 < difference["high"] < 0.07
    width = 2 * 1.96 * hard.std() / 400**0.5
    assert a["high"] - a["low"] == pytest.approx(width, rel=0.15)
    assert (
        set(figures["domains"]) == {"all", "x", "y"} and figures["domains"]["x"]["requests"] == 200
    )
    # Weights by steps: a long request counts more than a short one.
    figures = report(made_up([("", 1, 1, 1), ("", 9, 27, 27)]))
    assert figures["domains"]["all"]["drafts"]["a"]["accept_length"]["mean"] == 2.8
    alone = report(made_up([("", 1, 1, 1)]))["domains"]["all"]["drafts"]["a"]["accept_length"]
    assert alone == {"mean": 1.0, "low": None, "high": None}


def test_the_interval_covers_what_it_says():
    random, covered = np.random.default_rng(1), 0
    for _ in range(100):
        steps = random.integers(5, 40, 60)
        # of a request: its steps are alike
        rate = np.clip(random.normal(2.0, 0.5, 60), 1, 3)
        figures = report(made_up([("", n, n * r, 0) for n, r in zip(steps, rate)]))
        interval = figures["domains"]["all"]["drafts"]["a"]["accept_length"]
        covered += interval["low"] <= 2.0 <= interval["high"]
    assert 88 <= covered <= 100


def test_eval_compares_drafts_by_domain(models, recording, trained, tmp_path):
    arguments = [
        "eval",
        str(models / "draft"),
        str(trained),
        str(recording),
        "--target",
        str(models / "target"),
    ]
    files = ["--json", str(tmp_path / "f.json"), "--picture", str(tmp_path / "f.png")]
    result = CliRunner().invoke(app, arguments + files)
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "f.json").read_text())
    assert {name: d["requests"] for name, d in figures["domains"].items()} == {
        "all": 70, "code": 40, "prose": 20, "(none)": 10
    }  # fmt: skip
    new, old = figures["drafts"][1], figures["drafts"][0]
    for domain in figures["domains"].values():
        assert (
            domain["drafts"][new]["accept_length"]["low"]
            > 2
            > domain["drafts"][old]["accept_length"]["high"]
        )
        assert domain["differences"][f"{new} - {old}"]["low"] > 0.5
    depths = [
        row["accept_length"]["mean"]
        for row in figures["domains"]["all"]["drafts"][new]["as_chains"]
    ]
    assert depths == sorted(depths) and len(depths) == 2 == figures["draft_steps"]
    assert all(
        word in result.output
        for word in ("prose", "live", "rejection sampling", f"{depths[-1]:.3f}")
    )
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_evaluated_is_a_message(models, recording, tmp_path):
    make_random_target(tmp_path / "other", vocab=VOCAB, hidden=HIDDEN, seed=9)
    init_draft(tmp_path / "other", tmp_path / "draft", "random")
    with pytest.raises(ValueError, match="no request to evaluate on.*messages_of_another_target"):
        evaluate([tmp_path / "draft"], recording, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="given twice"):
        evaluate([models / "draft"] * 2, recording, str(models / "target"))


def test_a_table_and_a_picture_of_one_request(tmp_path):
    figures = report(made_up([("only", 3, 4)], drafts=["a"]))
    assert "1.333" in table(figures)
    picture(figures, tmp_path / "p.png")
