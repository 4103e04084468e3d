"""One run of the lab: a recording, a way of learning (an arm), a seed; one line of JSON.

    python scripts/lab_replay.py --home HOME --target DIRECTORY --arm NAME --recording R1 --seed 0

Every request is scored before it is trained on, with the weights that would have been served then,
by the one definition of accept length (aurora_trainer/learn/accept_length.py). That is exact for a
chain under SGLang's default verification, greedy or sampled, because a server's output does not
depend on its draft. Weights are swapped every so many requests, the same for all arms. Chains are
of as many drafts as the recording's header says (3 for a server without a draft).

A line has the steps and the tokens of each request's walk, what training cost in CPU seconds, and
everything that it takes to run it again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import children
import torch
from lab_ideas import IDEAS
from lab_recordings import MESSAGES

from aurora_trainer.config import TrainerFile, load_trainer_config
from aurora_trainer.intake.assemble import Assembler
from aurora_trainer.intake.sample import Sample
from aurora_trainer.learn.accept_length import measure
from aurora_trainer.learn.trainer import Training
from aurora_trainer.recordings.recording import CorruptionLog, read_messages

ARMS = Path(__file__).with_name("arms.toml")


def read_arms(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def arm_of(arms: dict[str, Any], name: str) -> dict[str, Any]:
    """An arm's own lists behind those of the arm that it is `like`, so that its words win."""
    arm = arms["arms"][name]
    if "like" not in arm:
        return arm
    base = arm_of(arms, arm["like"])
    both = {key: base.get(key, []) + arm.get(key, []) for key in ("draft", "settings", "ideas")}
    return base | arm | both


def initial_draft(home: Path, target: Path, words: list[str], seed: int) -> Path:
    """The untrained draft of `init-draft` with these words and this seed, made once."""
    said = json.dumps([words, seed, str(target)])
    draft = home / "drafts" / hashlib.sha256(said.encode()).hexdigest()[:16]
    if not draft.exists():
        # whole, or not there: another run may make it at the same time
        made = Path(tempfile.mkdtemp(dir=home)) / "draft"
        counts = ["--counts", home / "counts.json"]
        command = [*children.TRAINER, "init-draft", target, made, "--seed", str(seed), *words]
        subprocess.run(list(map(str, [*command, *counts])), check=True, stdout=sys.stderr)
        draft.parent.mkdir(exist_ok=True)
        with suppress(OSError):
            made.rename(draft)
        shutil.rmtree(made.parent)
    return draft


def configure(arm: dict[str, Any], target: Path, draft: Path, weights: str, seed: int):
    """The trainer's configuration of an arm."""
    own = [f"model.target={target}", f"model.draft={draft}", "gate.enabled=false"]
    # as it was when the first lines were made, so that they stay comparable; the gate is off
    own.append("gate.z=1.28")
    own += [f"pace.seed={seed}", *arm.get("settings", [])]
    directory = f"weights.directory={weights}"
    return load_trainer_config(None, [directory, *(f"trainer.{setting}" for setting in own)])


def settings_hash(arm: dict[str, Any]) -> str:
    """Of all that decides what an arm does, the trainer's defaults among it: lines of other
    settings are not compared."""
    config = configure(arm, Path("target"), Path("draft"), tempfile.gettempdir(), 0)
    # drift is off with the gate
    left_out = {"model": {"target", "draft"}, "drift": True}
    said = config.trainer.model_dump(mode="json", exclude=left_out)
    rest = {key: value for key, value in arm.items() if key not in ("settings", "like")}
    return hashlib.sha256(json.dumps([said, rest], sort_keys=True).encode()).hexdigest()[:12]


def windows(recording: Path, config: TrainerFile, size: int) -> Iterator[list[Sample]]:
    """The recording's samples in the order in which they ended, `size` at a time."""
    assembler, waiting = Assembler(config.trainer.assemble), list[Sample]()
    for _, message in read_messages(recording, CorruptionLog()):
        waiting += assembler.add(message)
        while len(waiting) >= size:
            yield waiting[:size]
            del waiting[:size]
    if waiting:
        yield waiting


def run(recording: Path, arm: dict[str, Any], config: TrainerFile, requests: int) -> dict[str, Any]:
    """Test, then train, window by window; the figures of a line."""
    torch.set_num_threads(config.trainer.pace.threads)
    training, cpu_s = Training(config), 0.0
    ideas = [IDEAS[name](training) for name in arm.get("ideas", [])]
    # what is learned does not depend on when it is served, so that one run tells of several
    lags = [arm["swap_every"], *arm.get("also_every", [])]
    scores: dict[int, list[tuple[float, float]]] = {lag: [] for lag in lags}
    domains, due = [], 0
    for window in windows(recording, config, max(lags)):
        domains += [sample.domain for sample in window]
        for number, sample in enumerate(window):
            swapped = [lag for lag in lags if number % lag == 0]
            began = time.process_time()
            if swapped and training.updates:
                training.publish()
            cpu_s += time.process_time() - began
            for lag in swapped:
                scores[lag] += accept(training, window[number : number + lag])
            began = time.process_time()
            for idea in ideas:
                idea.request(sample)
            training._keep(sample)
            due += 1
            while enough(arm, training, due):
                due = 0
                training.step()
            cpu_s += time.process_time() - began
        if requests and len(domains) >= requests:
            break
    first, *others = (
        {"steps": [int(n) for n, _ in found], "tokens": [int(n) for _, n in found]}
        for found in scores.values()
    )
    figures = {
        **first,
        "domains": domains,
        "updates": training.updates,
        "positions": training.positions,
        "cpu_s": round(cpu_s, 1),
    }
    if others:
        figures["by_lag"] = dict(zip(lags[1:], others))
    training.close()
    return figures


def enough(arm: dict[str, Any], training: Training, due: int) -> bool:
    """Whether it is time for a step: by requests, as in the reference, or as the trainer does."""
    per_step = arm.get("requests_per_step")
    if per_step is None:
        return training.due()
    return due >= per_step and len(training.buffer) > 0


def accept(training: Training, samples: list[Sample]) -> list[tuple[float, float]]:
    """(steps, tokens) of each sample's walk, had the weights drafted it that are served now."""
    trainer = training.config.trainer
    device = trainer.model.device
    return measure(training.served.draft, samples, trainer.batch, trainer.loss, device).tolist()


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ARMS.parent
    )
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--arms", type=Path, default=ARMS)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--recording", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--requests", type=int, default=0, help="of the recording; 0: all")
    options = parser.parse_args()
    arm, at_commit = arm_of(read_arms(options.arms), options.arm), commit()
    draft = initial_draft(options.home, options.target, arm.get("draft", []), options.seed)
    recording = options.home / "recordings" / options.recording / MESSAGES
    with tempfile.TemporaryDirectory() as weights:
        config = configure(arm, options.target, draft, weights, options.seed)
        figures = run(recording, arm, config, options.requests)
    line = {
        "arm": options.arm,
        "recording": options.recording,
        "seed": options.seed,
        "how": arm,
        "hash": settings_hash(arm),
        "target": options.target.name,
        "date": str(date.today()),
        "commit": at_commit,
        "torch": version("torch"),
        **figures,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
