"""How fast would a draft have learned with other settings?

Replays a recording offline, one setting after another.

    aurora-trainer run --config demo.toml --record recording      # record while a server serves
    python scripts/learning_curve.py recording --config demo.toml --try "" --try "optimizer.lr=1e-3
    loss.gamma=1"

Every sample is scored before it is trained on, with the weights that would have been served then,
by walking it along its committed tokens as `aurora-trainer eval` does. That is exact for greedy
traffic and a chain, because its tokens do not depend on the draft. `batch.depth=3` scores and
trains chains of 3 draft steps, whatever the server drew. The rejected nodes of the recording,
however, are those of the draft that served while it was recorded.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
import time
from pathlib import Path

import torch

from aurora_trainer.config import TrainerFile, load_trainer_config
from aurora_trainer.intake.assemble import Assembler
from aurora_trainer.intake.sample import Sample
from aurora_trainer.learn.score import measure
from aurora_trainer.learn.trainer import Training
from aurora_trainer.recordings.recording import CorruptionLog, read_messages


def replay(
    recording: Path, config: TrainerFile, publish_every: int, requests: int
) -> tuple[list[float], float, int]:
    """(accept length of each request, CPU seconds of training, steps); weights swap every
    `publish_every` requests.
    """
    torch.set_num_threads(config.trainer.pace.threads)
    training, lengths, waiting, cpu_s = Training(config), [], [], 0.0
    # a second one, to see samples before they are trained on
    assembler = Assembler(config.trainer.assemble)
    for _, message in read_messages(recording, CorruptionLog()):
        waiting += assembler.add(message)
        if len(waiting) >= publish_every:
            lengths += accept_lengths(training, waiting)
            training.publish()
            waiting = []
        began = time.process_time()
        training.feed(message, message.header.time_ns / 1e9)
        while training.due():
            training.step()
        cpu_s += time.process_time() - began
        if len(lengths) >= requests:
            break
    steps = training.steps
    training.close()
    return lengths, cpu_s, steps


def accept_lengths(training: Training, samples: list[Sample]) -> list[float]:
    """Tokens per verify step of each sample, had the served weights drafted it."""
    trainer = training.config.trainer
    device = trainer.model.device
    scores = measure(training.served.draft, samples, trainer.batch, trainer.loss, device)
    return [float(tokens / steps) for steps, tokens in scores if steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("recording", type=Path)
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        help="with trainer.model.target and .draft to start from",
    )
    parser.add_argument(
        "--try", dest="tries", action="append", help="settings below [trainer], apart by spaces"
    )
    parser.add_argument("--publish-every", type=int, default=15, help="requests between two swaps")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--bin", type=int, default=50, help="requests in a printed mean")
    parser.add_argument("--json", type=Path, help="file to append one line a setting to")
    options = parser.parse_args()
    print(
        f"accept length, mean of {options.bin} requests each; CPU seconds of training a request;"
        " optimizer steps"
    )
    for text in options.tries or [""]:
        with tempfile.TemporaryDirectory() as weights:
            own = [f"weights.directory={weights}", "trainer.gate.enabled=false"]
            config = load_trainer_config(
                options.config, own + [f"trainer.{s}" for s in shlex.split(text)]
            )
            lengths, cpu_s, steps = replay(
                options.recording, config, options.publish_every, options.requests
            )
        bins = [lengths[i : i + options.bin] for i in range(0, len(lengths), options.bin)]
        means = " ".join(f"{sum(b) / len(b):.2f}" for b in bins)
        print(
            f"{text or 'as configured':60} {means} | {cpu_s / max(len(lengths), 1):.3f} s, {steps}",
            flush=True,
        )
        if options.json:
            last = sum(lengths[-40:]) / 40
            row = {
                "settings": text,
                "lengths": lengths,
                "last_40": last,
                "cpu_s": cpu_s,
                "steps": steps,
            }
            with open(options.json, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
