"""`aurora-trainer`: run, check, init-draft.

Nothing heavy is imported before a command runs: --help is instant.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

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


class Kind(StrEnum):
    random = "random"
    target = "target"


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


@app.command("init-draft")
def init_draft(
    target: Annotated[
        str,
        typer.Argument(help="Directory of the target model, or its name in the local HF cache."),
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write the draft to.")],
    kind: Annotated[
        Kind, typer.Option(help="Random, or from the target's weights, able to copy.")
    ] = Kind.target,
    draft_vocab: Annotated[
        int | None, typer.Option(min=1, help="Keep so many target tokens (--counts).")
    ] = None,
    counts: Annotated[
        Path | None,
        typer.Option(help="JSON list: how often each target token was generated (length V)."),
    ] = None,
    aux_layers: Annotated[
        str | None,
        typer.Option(
            help="Target layers whose OUTPUT feeds the draft, e.g. 1,17,32. Default: SGLang's."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is random.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="same (as the target's), float32, bfloat16 or float16.")
    ] = "same",
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Key-value heads. Default: the target's.")
    ] = None,
    eagle31: Annotated[
        bool,
        typer.Option(
            "--eagle31", help="EAGLE 3.1's shape: norms before fc and of the state handed on."
        ),
    ] = False,
) -> None:
    """Write an untrained draft for a target: config.json and model.safetensors that SGLang
    loads.
    """
    with _report_user_errors():
        import json

        import torch

        from aurora_trainer.drafts import eagle3_init as init
        from aurora_trainer.drafts.target import open_target

        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype == "same":
            dtype = str(open_target(target).embedding().dtype).removeprefix("torch.")
        if dtype not in dtypes:
            raise ValueError(f"--dtype {dtype}: expected same or one of {', '.join(dtypes)}")
        token_counts = torch.tensor(json.loads(counts.read_text())) if counts else None
        layers = tuple(int(i) for i in aux_layers.split(",")) if aux_layers else None
        draft = init.init_draft(
            target, out, kind.value, draft_vocab, token_counts, layers, seed=seed,
            dtype=dtypes[dtype],
            kv_heads=kv_heads, eagle31=eagle31,
        )  # fmt: skip
        size = sum(p.numel() for p in draft.parameters())
        typer.echo(
            f"draft written directory={out} kind={kind.value} parameters={size}"
            f" vocabulary={len(draft.d2t)}"
        )


app.add_typer(recording_commands)
app.add_typer(weights_commands)
