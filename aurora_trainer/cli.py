"""`aurora-trainer`: run, check, init-draft.

Nothing heavy is imported before a command runs: --help is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aurora_trainer.drafts.init_command import init_draft
from aurora_trainer.tools.options import ConfigPath, Overrides, log_to_stderr
from aurora_trainer.tools.recordings import app as recording_commands
from aurora_trainer.tools.report_user_errors import report_user_errors as _report_user_errors
from aurora_trainer.tools.weights import app as weights_commands

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# a default of a list that nobody can change
HERE: Any = ("http://127.0.0.1:30000",)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("aurora-speculative"))
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Train a server's speculative draft from what it verifies, and send it back."""


@app.command()
def run(
    config: ConfigPath = None,
    overrides: Overrides = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many optimizer steps.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Also record what is received to this directory.")
    ] = None,
) -> None:
    """Receive, train and publish until stopped (SIGTERM, Ctrl-C)."""
    with _report_user_errors():
        log_to_stderr()
        from aurora_trainer.config import load_trainer_config
        from aurora_trainer.daemon import open_daemon

        open_daemon(load_trainer_config(config, overrides or ())).run_live(steps, record)


@app.command()
def check(config: ConfigPath = None, overrides: Overrides = None) -> None:
    """Check the configuration of both sides, and what it names, without starting anything."""
    with _report_user_errors():
        from aurora_trainer.config import load_trainer_config
        from aurora_trainer.tools.check import check_all

        if not check_all(load_trainer_config(config, overrides or ())):
            raise typer.Exit(1)


@app.command()
def keygen(
    directory: Annotated[
        Path, typer.Argument(help="Directory of the keys; made if it is not there.")
    ],
    server: Annotated[
        list[str] | None,
        typer.Option(help="Name of a server to make keys for. Repeatable. Default: server."),
    ] = None,
) -> None:
    """Make the keys of the link: the trainer's, unless they are there, and each named server's.

    Overwrites nothing.
    """
    with _report_user_errors():
        from aurora_trainer.tools.keygen import keygen

        typer.echo(keygen(directory, server or ["server"]))


@app.command()
def top(
    server: Annotated[
        list[str],
        typer.Option(help="Address of a server started with --enable-metrics. Repeatable."),
    ] = HERE,
    trainer: Annotated[str | None, typer.Option(help="Address of trainer.metrics.port.")] = None,
    status: Annotated[
        Path | None, typer.Option(help="The trainer's status file, if it has no port.")
    ] = None,
    every: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two frames; rates are over them.")
    ] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame; exit code 1 if a side is absent.")
    ] = False,
    config: ConfigPath = None,
) -> None:
    """Show what server and trainer do, live, on one screen. --trainer or --status default to what
    --config says.
    """
    with _report_user_errors():
        from aurora_trainer.tools.top import show

        if config is not None and trainer is None and status is None:
            from aurora_trainer.config import load_trainer_config

            metrics = load_trainer_config(config).trainer.metrics
            trainer = f"http://127.0.0.1:{metrics.port}" if metrics.port else None
            status = metrics.status_file
        try:
            if not show(server, trainer, status, every, once):
                raise typer.Exit(1)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None


# its options are those of the kind of draft
app.command("init-draft")(_report_user_errors()(init_draft))
app.add_typer(recording_commands)
app.add_typer(weights_commands)
