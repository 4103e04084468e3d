"""What the users of demo-real say: from a file, or questions about Python's own library."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from itertools import chain, islice, zip_longest
from pathlib import Path

import text
from clients import Prompt

_FUNCTION = re.compile(r"^( *)def .*\n(?:\1 +.*\n|\n){3,}", re.MULTILINE)
# of a function, in a question
_LINES = 16


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: JSON objects with a `text` and perhaps a `domain`, or a prompt a line.

    Raises ValueError, OSError.
    """
    lines = [
        (n, line)
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.strip()
    ]
    if not lines:
        raise ValueError(
            f"{path} is empty; expected a prompt a line, or a JSON object with a text a line"
        )
    if not lines[0][1].startswith("{"):
        return [Prompt("chat", line.strip()) for _, line in lines]
    return [_read_object(f"{path}:{n}", line) for n, line in lines]


def built_in_prompts() -> list[Prompt]:
    """Some thousand of three domains, made of the standard library's code and documentation."""
    code = [
        m[0] for document in text.documents("code", "heldout") for m in _FUNCTION.finditer(document)
    ]
    blocks = [
        "\n".join([line for line in block.splitlines() if line.strip()][:_LINES]) for block in code
    ]
    prose = [
        p
        for document in text.documents("prose", "heldout")
        for p in document.splitlines()
        if len(p) > 120
    ]
    return [
        *(
            Prompt("code", f"Complete this Python function:\n\n```python\n{_head(b)}\n```")
            for b in blocks[0::2]
        ),
        *(
            Prompt("chat_code", f"Explain what this Python code does:\n\n```python\n{b}\n```")
            for b in blocks[1::2]
        ),
        *(Prompt("chat", f"Explain this to a beginner, with an example: {p}") for p in prose),
    ]


def choose(
    prompts: Iterable[Prompt], count: int, more: int, fits: Callable[[str], bool], seed: int = 0
) -> tuple[list[Prompt], list[Prompt]]:
    """`count` that fit, each once, from every domain alike, in random order, and `more` others.

    There may be fewer, first of the others. Raises ValueError if none fits.
    """
    order = random.Random(seed)
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain, []).append(prompt)
    for domain in by_domain.values():
        order.shuffle(domain)
    fitting = (filter(lambda prompt: fits(prompt.text), domain) for domain in by_domain.values())
    turns = chain.from_iterable(zip_longest(*fitting))
    chosen = list(islice((prompt for prompt in turns if prompt is not None), count + more))
    if not chosen:
        raise ValueError(
            "every prompt is longer than what a request may have; expected shorter ones"
        )
    first, others = chosen[:count], chosen[count:]
    order.shuffle(first)
    order.shuffle(others)
    return first, others


def _head(block: str) -> str:
    return "\n".join(block.splitlines()[:4])


def _read_object(where: str, line: str) -> Prompt:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{where}: not JSON ({error}); expected an object a line, as in the first"
        ) from None
    words, domain = (
        (value.get("text"), value.get("domain", "chat"))
        if isinstance(value, dict)
        else (None, None)
    )
    if not isinstance(words, str) or not isinstance(domain, str) or not words.strip():
        raise ValueError(
            f'{where}: expected {{"text": "...", "domain": "..."}}, the domain may be left out'
        )
    return Prompt(domain, words)
