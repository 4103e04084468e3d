"""Servers that the loop's tests share: one for each configuration, started when the first test
needs one, two at a time, and only those that the collected tests name.

    plain   no speculation: what the output must be
    chain   topk 1, 4 steps, prefill in chunks of 64
    tree    topk 2, 4 steps, 8 nodes, a reduced draft vocabulary
    mixed   topk 1, 3 steps, mixed chunks of 32, and a running request retracted every few steps;
            features in float8
    modern  topk 2, 4 steps, 6 nodes; a draft of EAGLE 3.1's shape with yarn, a bias and its
            target's family as its own
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from drafts import teach
from rig import START_S, Loop
from serve import Server
from transformers import AutoModelForCausalLM, AutoTokenizer

from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_init import init_draft

ROOT = Path(__file__).parents[2]
SERVERS = ("plain", "chain", "tree", "mixed", "modern")
DRAFT_VOCAB = 700


@pytest.fixture(scope="session")
def target() -> Path:
    """A language model that is trained within a minute, once; AURORA_TEST_TARGET names one that is
    there.
    """
    if "AURORA_TEST_TARGET" in os.environ:
        return Path(os.environ["AURORA_TEST_TARGET"])
    directory = ROOT / ".cache" / "target-quick"
    command = [sys.executable, ROOT / "scripts" / "make_target.py", "--quick", "--out", directory]
    subprocess.run(command, check=True, cwd=ROOT)
    return directory


@pytest.fixture(scope="session")
def model(target):
    """The target as Hugging Face computes it."""
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def stream(target) -> list[int]:
    """Token ids of real text to cut prompts from; no two tests should cut at the same place, or the
    cache is hit.
    """
    tokenizer = AutoTokenizer.from_pretrained(target)
    texts = [
        Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, typing, inspect)
    ]
    tokens = tokenizer("".join(texts))["input_ids"]
    assert len(tokens) > 40000
    return tokens


@pytest.fixture(scope="session")
def taught(target, model, stream, tmp_path_factory):
    """Directories of drafts that accept something: `full`, and `reduced` with a vocabulary of
    DRAFT_VOCAB.
    """
    folder = tmp_path_factory.mktemp("drafts")
    counts = torch.tensor(stream).bincount(minlength=model.config.vocab_size)
    for name, draft_vocab in (("full", None), ("reduced", DRAFT_VOCAB)):
        draft = init_draft(
            target, folder / name, "target", draft_vocab=draft_vocab, token_counts=counts
        )
        teach(draft, model, stream).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def modern_draft(target, model, stream, tmp_path_factory) -> Path:
    """What a draft published elsewhere may be: every switch of its config changes what it
    computes.
    """
    folder = tmp_path_factory.mktemp("modern")
    shaped = init_draft(target, folder, "target", kv_heads=1, eagle31=True)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    change = {
        "rope_scaling": yarn,
        "rope_parameters": None,
        "attention_bias": True,
        "model_type": "qwen2",
    }
    config = DraftConfig.from_json({**shaped.config.to_json(), **change})
    draft = Draft(config, shaped.embed, shaped.d2t)
    bias = {n: torch.zeros_like(p) for n, p in draft.named_parameters() if n.endswith("bias")}
    draft.load_checkpoint({**shaped.checkpoint(), **bias})
    teach(draft, model, stream).save(folder)
    raw = json.loads((folder / "config.json").read_text()) | {
        "model_type": "qwen2",
        "sliding_window": 16,
    }
    (folder / "config.json").write_text(json.dumps(raw | {"use_sliding_window": False}))
    return folder


@pytest.fixture(scope="session")
def starts(request, target, taught, tmp_path_factory):
    """Futures of the servers that the collected tests need."""
    folder = tmp_path_factory.mktemp("loop")

    def start(name: str):
        (folder / name).mkdir()
        if name == "plain":
            return Server(target, log=folder / "plain.log", timeout_s=START_S)
        draft = taught / ("reduced" if name == "tree" else "full")
        if name == "chain":
            args = ["--chunked-prefill-size", "64"]
            return Loop(folder / name, target, draft, topk=1, num_steps=4, args=args)
        if name == "tree":
            args = ["--chunked-prefill-size", "64"]
            return Loop(
                folder / name, target, draft, topk=2, num_steps=4, num_draft_tokens=8, args=args
            )
        if name == "modern":
            return Loop(
                folder / name, target, modern_draft, topk=2, num_steps=4, num_draft_tokens=6
            )
        args = ["--chunked-prefill-size", "32", "--enable-mixed-chunk"]
        env = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "23"}
        settings = ["plugin.capture.max_prompt_features=100", 'plugin.capture.features="float8"']
        return Loop(
            folder / name, target, draft, topk=1, num_steps=3, args=args, env=env, settings=settings
        )

    named = [n for item in request.session.items for n in (*item.fixturenames, *_parameters(item))]
    wanted = [name for name in dict.fromkeys(named) if name in SERVERS]
    modern_draft = request.getfixturevalue("modern_draft") if "modern" in wanted else None
    # its threads must outlive the servers, which die with their parent thread
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(start, name) for name in wanted}
        yield futures
        for future in futures.values():
            if future.cancel() or future.exception() is not None:
                continue
            future.result().stop()


def _parameters(item) -> list:
    """Values of a parametrized test, which may be names of servers."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return [value for value in values if isinstance(value, str)]


@pytest.fixture(scope="session")
def plain(starts) -> Server:
    return starts["plain"].result()


@pytest.fixture(scope="session")
def chain(starts) -> Loop:
    return starts["chain"].result()


@pytest.fixture(scope="session")
def tree(starts) -> Loop:
    return starts["tree"].result()


@pytest.fixture(scope="session")
def mixed(starts) -> Loop:
    return starts["mixed"].result()


@pytest.fixture(scope="session")
def modern(starts) -> Loop:
    return starts["modern"].result()
