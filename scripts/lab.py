"""The learning lab: which way of learning needs the fewest requests, on a real model's traffic.

    python scripts/lab.py record --target DIRECTORY --prompts FILE [--home DIR]
    python scripts/lab.py run STAGE --target DIRECTORY [--home DIR] [--jobs 1]
    python scripts/lab.py report

`record` makes the recordings of scripts/arms.toml, `run` every run of a stage that
docs/results/lab/lines.jsonl has no line of, `report` the tables and pictures beside it. All can be
stopped at any moment and go on where they were; the recording or run that was under way starts
again. Runs are children at the lowest priority.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

import children
from lab_replay import ARMS, arm_of, read_arms, settings_hash

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "lab"
LINES = "lines.jsonl"
REPLAY = Path(__file__).with_name("lab_replay.py")
# tokens that drafts of the lab can propose are chosen by the prompts' own
COUNTS = "counts.json"

# arm, recording, seed, requests
Key = tuple[str, str, int, int]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """One line of each run, the newest; half a line, of a run that was killed, is none."""
    lines: dict[tuple, dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            line = json.loads(text)
            lines[line["arm"], line["recording"], line["seed"], line["hash"]] = line
    return list(lines.values())


def missing(
    stage: dict[str, Any], arms: dict[str, Any], lines: Sequence[dict[str, Any]]
) -> Iterator[Key]:
    """The runs of a stage that no line has, first seeds first. A longer run has the shorter one in
    it; one with other settings counts for nothing."""
    wanted = stage.get("requests", 0)
    done = {
        (line["arm"], line["recording"], line["seed"], line["hash"])
        for line in lines
        if line["of_requests"] == 0 or 0 < wanted <= line["of_requests"]
    }
    for seed in stage["seeds"]:
        for arm in stage["arms"]:
            same = settings_hash(arm_of(arms, arm))
            if (arm, stage["recording"], seed, same) not in done:
                yield arm, stage["recording"], seed, wanted


def record(options: argparse.Namespace) -> None:
    from chat_prompts import read_prompts
    from lab_recordings import Traffic, deal, record

    prompts = read_prompts(options.prompts)
    count_tokens(options, "\n".join(prompt.text for prompt in prompts))
    given = read_arms(options.arms)["recordings"]
    traffics = [Traffic.read(name, traffic) for name, traffic in given.items()]
    dealt = deal(prompts, traffics)
    for traffic in traffics:
        if not options.only or traffic.name in options.only:
            own = dealt[traffic.name]
            about = record(options.home, options.target, traffic, own, options.clients)
            print(traffic.name, json.dumps(about), flush=True)


def count_tokens(options: argparse.Namespace, text: str) -> None:
    """Write home/counts.json, how often the prompts have each token."""
    counts = options.home / COUNTS
    if not counts.exists():
        options.home.mkdir(parents=True, exist_ok=True)
        texts = options.home / "prompts.txt"
        texts.write_text(text)
        words = ["prune-vocab", options.target, "--text", texts, "--counts", counts]
        children.run_to_end([*children.TRAINER, *words])


def run(options: argparse.Namespace) -> None:
    arms = read_arms(options.arms)
    stages = {stage["name"]: stage for stage in arms["stages"]}
    if options.stage not in stages:
        raise SystemExit(f"lab: no stage {options.stage!r}; expected one of {', '.join(stages)}")
    stage = stages[options.stage]
    lines = options.results / LINES
    keys = list(missing(stage, arms, read_lines(lines)))
    print(f"{stage['name']}: {len(keys)} runs to do", flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    failed = 0
    pool = ThreadPoolExecutor(options.jobs)
    try:
        for future in as_completed([pool.submit(replay, options, key) for key in keys]):
            try:
                line = future.result()
            except ChildProcessError as error:
                print(f"lab: {error}", file=sys.stderr, flush=True)
                failed += 1
                continue
            with lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
            half = len(line["steps"]) // 2
            length = sum(line["tokens"][half:]) / max(sum(line["steps"][half:]), 1)
            print(
                f"{line['arm']:20} seed {line['seed']}  accept length of the second half"
                f" {length:.3f}  {line['cpu_s']:.0f} s of training",
                flush=True,
            )
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        raise SystemExit(f"lab: {failed} runs failed")


def replay(options: argparse.Namespace, key: Key) -> dict[str, Any]:
    arm, recording, seed, requests = key
    words = [sys.executable, REPLAY, "--home", options.home, "--target", options.target]
    words += [
        "--arms",
        options.arms,
        "--arm",
        arm,
        "--recording",
        recording,
        "--seed",
        seed,
        "--requests",
        requests,
    ]
    done = subprocess.run(
        [str(word) for word in words], stdout=subprocess.PIPE, text=True, preexec_fn=in_background
    )
    if done.returncode:
        raise ChildProcessError(f"the run of {key} failed with {done.returncode}; see above")
    return json.loads(done.stdout.splitlines()[-1]) | {"of_requests": requests}


def in_background() -> None:
    os.nice(19)
    children.die_with_parent()


def report(options: argparse.Namespace) -> None:
    from lab_report import write

    arms = read_arms(options.arms)
    current = {name: settings_hash(arm_of(arms, name)) for name in arms["arms"]}
    lines = [
        line
        for line in read_lines(options.results / LINES)
        if current.get(line["arm"]) == line["hash"]
    ]
    write(lines, arms.get("claims", []), options.results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record", help="make the recordings that are missing")
    recording.add_argument("only", nargs="*", help="their names; default: all")
    recording.add_argument("--prompts", type=Path, required=True)
    recording.add_argument("--clients", type=int, default=8, help="requests at a time")
    recording.set_defaults(act=record)
    running = commands.add_parser("run", help="make the runs of a stage that are missing")
    running.add_argument("stage")
    running.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    running.set_defaults(act=run)
    for command in (recording, running):
        command.add_argument("--target", type=Path, required=True, help="directory of the model")
        command.add_argument("--home", type=Path, default=Path(".cache/lab"))
    reporting = commands.add_parser("report", help="tables and pictures of what was run")
    reporting.set_defaults(act=report)
    for command in (recording, running, reporting):
        command.add_argument("--arms", type=Path, default=ARMS, help="another file of arms")
        command.add_argument("--results", type=Path, default=RESULTS, help="where the lines are")
    options = parser.parse_args()
    options.act(options)


if __name__ == "__main__":
    main()
