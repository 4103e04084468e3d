"""What several commands share: options, and where their log goes."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="TOML file, the same as the server's.", envvar="AURORA_CONFIG"
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, e.g. trainer.optimizer.lr=1e-3. Repeatable."),
]
RecordingPath = Annotated[
    Path, typer.Argument(help="Directory of a recording, or one of its files.")
]


def log_to_stderr(level: int = logging.INFO) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=level, format="%(asctime)s %(levelname).1s %(name)s %(message)s"
    )
