"""The commands about recordings, and the one that looks into everything: record, replay, eval,
inspect.

`cli.py` adds them to the others. As there, nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aurora_trainer.tools.options import ConfigPath, Overrides, RecordingPath, log_to_stderr
from aurora_trainer.tools.report_user_errors import report_user_errors

app = typer.Typer()


class Pace(StrEnum):
    fast = "fast"
    original = "original"


@app.command()
def record(
    out: Annotated[
        Path, typer.Option(help="Directory of the recording; one that is there goes on.")
    ],
    config: ConfigPath = None,
    overrides: Overrides = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Stop after so long.")] = None,
) -> None:
    """Receive in the trainer's place, and write what comes to files until stopped (SIGTERM,
    Ctrl-C).
    """
    with report_user_errors():
        log_to_stderr()
        from aurora_trainer.config import load_trainer_config
        from aurora_trainer.tools.record import record

        record(load_trainer_config(config, overrides or ()), out, seconds)


@app.command()
def replay(
    recording: RecordingPath,
    config: ConfigPath = None,
    overrides: Overrides = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many optimizer steps.")
    ] = None,
    pace: Annotated[
        Pace, typer.Option(help="As fast as it can, or as it was recorded.")
    ] = Pace.fast,
    to: Annotated[
        str | None,
        typer.Option(help="Send to the trainer at this endpoint instead of training here."),
    ] = None,
) -> None:
    """Train on a recording instead of live traffic, or send it to a live trainer."""
    with report_user_errors():
        log_to_stderr()
        from aurora_trainer.config import load_trainer_config

        original = pace is Pace.original
        if to is not None:
            from aurora_trainer.recordings.replay import push

            if steps is not None:
                raise ValueError(
                    "--steps with --to: expected one of them; the live trainer counts its own steps"
                )
            settings = load_trainer_config(config, [*(overrides or ()), f"link.endpoint={to}"])
            counts = push(recording, settings.link, original_pace=original)
            typer.echo("replayed " + " ".join(f"{name}={count}" for name, count in counts.items()))
            return
        from aurora_trainer.daemon import open_daemon

        settings = load_trainer_config(config, overrides or ())
        open_daemon(settings).run_recording(recording, steps, original_pace=original)


@app.command()
def inspect(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Recordings, weights directories or versions, checkpoints, drafts."),
    ],
    message: Annotated[
        int | None, typer.Option(min=0, help="Show this message of a recording: its trees.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Directory with the target's tokenizer.json: tokens as text, not as ids."
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(min=0, help="The target's likeliest tokens to show beside each node.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Look into what Aurora wrote. Exit code 1 if something of it is damaged."""
    with report_user_errors():
        log_to_stderr()
        import json

        from aurora_trainer.tools.describe import describe, problems
        from aurora_trainer.tools.describe_recording import (
            describe_message,
            message_at,
            message_text,
            token_names,
        )

        damaged = 0
        for number, path in enumerate(paths):
            if message is None:
                found, text = describe(path)
            else:
                found = describe_message(*message_at(path, message), token_names(tokenizer), top)
                text = message_text(found)
            # an object a line
            if as_json:
                typer.echo(json.dumps(found))
            else:
                # a terminal that cannot show a character shows a question mark
                encoding = sys.stdout.encoding or "utf-8"
                typer.echo(
                    ("\n" if number else "") + text.encode(encoding, "replace").decode(encoding)
                )
            damaged += problems(found)
        if damaged:
            raise typer.Exit(1)


@app.command("eval")
def evaluate(
    drafts: Annotated[
        list[Path],
        typer.Argument(help="Directories of drafts, or a weights directory: its newest."),
    ],
    recording: RecordingPath,
    target: Annotated[
        str | None,
        typer.Option(
            help="Directory of the target, or its name in the HF cache. Default: --config's."
        ),
    ] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
    depth: Annotated[
        int, typer.Option(min=0, max=16, help="Draft steps; 0: as many as were recorded.")
    ] = 0,
    requests: Annotated[
        int, typer.Option(min=0, help="Evaluate on the first so many; 0: all.")
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every figure here.")
    ] = None,
    picture_file: Annotated[
        Path | None, typer.Option("--picture", help="Draw them here (PNG).")
    ] = None,
) -> None:
    """What accept length would these drafts have had on recorded traffic?

    By domain, by depth, with intervals.
    """
    with report_user_errors():
        log_to_stderr()
        import json

        from aurora_trainer.config import load_trainer_config
        from aurora_trainer.lab import evaluation_report as figures
        from aurora_trainer.lab.evaluate import evaluate

        target = target or load_trainer_config(config, overrides or ()).trainer.model.target
        evaluated = evaluate(
            drafts, recording, target, depth=depth, device=device, max_requests=requests
        )
        report = figures.report(evaluated, seed)
        typer.echo(figures.table(report))
        if json_file is not None:
            json_file.write_text(json.dumps(report, indent=1) + "\n")
        if picture_file is not None:
            figures.picture(report, picture_file)
