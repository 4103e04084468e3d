"""Text for a terminal: nothing that came over the wire or from a file reaches it unescaped."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Justify = Literal["left", "right"]
# of a table: nothing is cut
WIDEST = 100_000


def escape(text: object, limit: int = 100) -> str:
    """Without control characters, bidirectional overrides and the like; longer text is cut in the
    middle.
    """
    text = str(text)
    if len(text) > limit:
        text = f"{text[: limit // 2]}…{text[-limit // 2 :]}"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def columns(
    head: Sequence[str], rows: Iterable[Sequence[str]], justify: Justify = "left"
) -> list[str]:
    """A table as plain lines, as wide as its cells whatever the terminal."""
    # late: --help must be instant
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in head:
        table.add_column(name, justify=justify)
    for row in rows:
        # Text: a cell's brackets are no markup
        table.add_row(*map(Text, row))
    console = Console(width=WIDEST, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as 0-2, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def moment(unix_s: float) -> str:
    """Local time, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def value(of: Any) -> str:
    """A scalar, or a mapping or list of scalars, on one line."""
    if isinstance(of, float):
        return f"{of:.4g}" if abs(of) < 1e6 else f"{of:.0f}"
    if isinstance(of, Mapping):
        return " ".join(f"{escape(k)}={value(v)}" for k, v in of.items()) or "-"
    if isinstance(of, list | tuple):
        return ", ".join(map(value, of)) or "-"
    return escape(of)
