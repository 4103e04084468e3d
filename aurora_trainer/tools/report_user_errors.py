"""What a command says when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def report_user_errors() -> Iterator[None]:
    """What the user can put right is one message and exit code 2; the rest is a defect and keeps
    its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"aurora-trainer: {error}", err=True)
        raise typer.Exit(2) from None
