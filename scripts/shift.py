"""A shift of traffic and back: is what is served ever below the initial draft?

    python scripts/shift.py [--seeds 0 1 2] [--requests 150] [--home .cache/shift]

Records the demo's target once while it answers code and prose. A seed's initial draft learns both
kinds of text; then its trainer meets code alone, prose alone and code again (other requests). Each
request is scored before anything else, with the draft that would be served then and with the
initial one (learn/accept_length.py), then given to the trainer, which publishes every
so many requests, and at once where it wants to. What a replay leaves out: requests that are under
way while a version is swapped.

Says, of every window of 20 requests that begins 20 or more requests after a shift, the least that
the served draft was ahead of the initial one, and the same where the initial draft is never
published. Ends with 1 where a window is below -0.05.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import children
import numpy as np
import torch
from clients import send
from demo import LEARNING, TARGET, make_prompts
from lab_recordings import MESSAGES, recorded
from lab_statistics import ahead

from aurora_trainer.config import TrainerFile, load_trainer_config
from aurora_trainer.intake.assemble import Assembler
from aurora_trainer.intake.sample import Sample
from aurora_trainer.learn.accept_length import accept_length, measure
from aurora_trainer.learn.trainer import Training
from aurora_trainer.recordings.recording import CorruptionLog, read_messages

LEAST = -0.05


def record(options: argparse.Namespace, name: str, stretches: list[tuple[str, list]]) -> Path:
    """home/NAME, the target's answers to the stretches' prompts, one after the other."""
    directory = options.home.resolve() / name
    if (directory / "whole").exists():
        return directory / MESSAGES
    with recorded(directory, options.target.resolve()) as server:
        for domain, prompts in stretches:
            replies = list(send(server, prompts, tokens=options.tokens, domain=domain))
            print(f"recorded {len(replies)} requests of {domain}", flush=True)
    (directory / "whole").touch()
    return directory / MESSAGES


def samples(recording: Path, config: TrainerFile) -> Iterator[Sample]:
    assembler = Assembler(config.trainer.assemble)
    for _, message in read_messages(recording, CorruptionLog()):
        yield from assembler.add(message)


def configure(options: argparse.Namespace, home: Path, draft: Path, seed: int, *more: str):
    """The demo's learning, with a trainer of its own in `home`."""
    file = home / "aurora.toml"
    home.mkdir(parents=True, exist_ok=True)
    target = options.target.resolve()
    model = f'[trainer.model]\ntarget = "{target}"\ndraft = "{draft}"\n'
    file.write_text(model + LEARNING)
    own = [f"weights.directory={home}/weights", f"trainer.checkpoint.directory={home}/checkpoints"]
    return load_trainer_config(file, [*own, f"trainer.pace.seed={seed}", *more])


def follow(training: Training, recording: Path, every: int) -> tuple[np.ndarray, list[str]]:
    """Steps and tokens of each request, of the served and of the initial draft, float64 [n, 2, 2];
    the roles of what was published, by request."""
    trainer, scores, roles = training.config.trainer, [], []
    for n, sample in enumerate(samples(recording, training.config), 1):
        walks = [
            measure(draft, [sample], trainer.batch, trainer.loss, trainer.model.device)[0]
            for draft in (training.served.draft, training.served.initial)
        ]
        scores.append(walks)
        training._keep(sample)
        while training.due():
            training.step()
        before = sum(training.published_roles.values())
        if n % every == 0 or training.urgent:
            training.publish()
        published = sum(training.published_roles.values()) > before
        roles.append(training.gate.newest.role if published else "")
    return np.array(scores), roles


def initial_draft(options: argparse.Namespace, mixed: Path, seed: int) -> Path:
    """A draft that has learned both kinds of text."""
    home = options.home / f"seed-{seed}"
    draft = home / "initial"
    if draft.exists():
        return draft
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    words = ["init-draft", options.target, home / "untrained", "--kind", "random"]
    children.run_to_end([*children.TRAINER, *words, "--seed", str(seed)])
    gate = "trainer.gate.enabled=false"
    config = configure(options, home / "making", home / "untrained", seed, gate)
    training = Training(config)
    for _ in range(options.passes):
        for sample in samples(mixed, config):
            training._keep(sample)
            while training.due():
                training.step()
    training.draft.save(draft, torch.float32)
    training.close()
    return draft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--requests", type=int, default=150, help="of each of the three stretches")
    parser.add_argument("--tokens", type=int, default=128, help="of a request")
    parser.add_argument("--passes", type=int, default=1, help="of the initial draft's training")
    parser.add_argument("--every", type=int, default=15, help="requests between two publications")
    parser.add_argument("--home", type=Path, default=Path(".cache/shift"))
    parser.add_argument("--target", type=Path, default=TARGET)
    options = parser.parse_args()
    options.home = options.home.resolve()
    torch.set_num_threads(1)
    count = options.requests
    given = make_prompts(options.target.resolve(), 3 * count)
    # a few of one, a few of the other
    mixed = [
        (domain, given[domain][first : first + 10])
        for first in range(0, count, 10)
        for domain in ("code", "prose")
    ]
    recordings = [
        record(options, "mixed", mixed),
        record(
            options,
            "shifts",
            [
                ("code", given["code"][count : 2 * count]),
                ("prose", given["prose"][count : 2 * count]),
                ("code", given["code"][2 * count : 3 * count]),
            ],
        ),
    ]
    below = False
    for seed in options.seeds:
        draft = initial_draft(options, recordings[0], seed)
        for barred in (False, True):
            home = options.home / f"seed-{seed}" / ("barred" if barred else "anchored")
            shutil.rmtree(home, ignore_errors=True)
            training = Training(configure(options, home, draft, seed))
            if barred:
                # the gate and drift.py are told that there is none
                model = training.config.trainer.model.model_copy(update={"draft": None})
                trainer = training.config.trainer.model_copy(update={"model": model})
                training.config = training.config.model_copy(update={"trainer": trainer})
            scores, roles = follow(training, recordings[1], options.every)
            shifts = [(count, count), (2 * count, 2 * count)]
            least = [by for by, _ in ahead(scores[:, 0], scores[:, 1], shifts)]
            line = {
                "seed": seed,
                "anchored": not barred,
                "least_ahead": round(min(least), 3),
                "windows_below": sum(one < LEAST for one in least),
                "of_windows": len(least),
                "served": [round(accept_length(part[:, 0]), 3) for part in np.split(scores, 3)],
                "initial": [round(accept_length(part[:, 1]), 3) for part in np.split(scores, 3)],
                "published": dict(training.published_roles),
                "initial_at": [n for n, role in enumerate(roles, 1) if role == "initial"],
                "changes": dict(training.arrivals.drift.changes),
                "changed_at": [
                    when[0] for when, event in training.arrivals.events if event.kind == "changed"
                ],
            }
            print(json.dumps(line), flush=True)
            training.close()
            below |= not barred and min(least) < LEAST
    sys.exit(1 if below else 0)


if __name__ == "__main__":
    main()
