"""Real text that any machine with Python has, in two domains that differ.

`code` is the standard library's sources without their docstrings and comment lines. `prose` is
English: the paragraphs of docstrings, comments and documentation topics, of the standard library
and of the packages in PROSE_PACKAGES that are installed beside us, unwrapped, with code examples,
tables and lists left out.

A file belongs to one split, by a hash of its name, and a text that occurs in a held-out file is
dropped from training.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

DOMAINS = ("code", "prose")
SPLITS = ("train", "heldout")
PROSE_PACKAGES = (
    "numpy",
    "networkx",
    "sympy",
    "torch",
    "transformers",
    "pydantic",
    "IPython",
    "setuptools",
    "pip",
)

# Tests are boilerplate, encodings are tables, and generated tokens teach nothing.
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
    *("test", "tests", "idle_test", "encodings", "pydoc_data"),
}
_HELDOUT_ONE_IN = 12
_STDLIB = Path(sysconfig.get_path("stdlib"))
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

_LISTED = re.compile(r"^\s*(?:[-*+|]|\d+\.)\s", re.MULTILINE)
_TRIPLE_QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)
_ROLE = re.compile(r":[a-z:]+:`~?\.?([^`<]*?)(?: <[^>]*>)?`")
_SENTENCE = re.compile(r"^[A-Z][A-Za-z0-9 ,.;:'\"()\-/%*_=+?!]*[.?!:]$")
_ARGUMENTS = re.compile(r"(?:Args|Arguments|Parameters|Params|Returns|Yields|Raises|Keyword)\b")
# Where a prompt may start: a line of code that is not all indentation, a sentence.
_STARTS = {
    "code": re.compile(r"^(?=[ ]*[A-Za-z@])", re.MULTILINE),
    "prose": re.compile(r"(?:^|[.?!] )(?=[A-Z])", re.MULTILINE),
}
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


def _python_files(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            if path.stat().st_size < 500_000:
                package = "stdlib" if root == _STDLIB else root.name
                yield f"{package}/{path.relative_to(root).as_posix()}", path


def _sources(domain: str) -> Iterator[tuple[str, Path | str]]:
    """The name and the path of every source of a domain; of a documentation topic, the name and the
    text.
    """
    yield from _python_files(_STDLIB)
    if domain == "prose":
        from pydoc_data.topics import topics

        yield from ((f"topics/{name}", topic) for name, topic in topics.items())
        for package in PROSE_PACKAGES:
            spec = importlib.util.find_spec(package)
            if spec is not None and spec.submodule_search_locations:
                yield from _python_files(Path(spec.submodule_search_locations[0]))


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _parse(source: str) -> ast.Module | None:
    # old escape sequences in other people's strings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _docstrings(tree: ast.Module) -> Iterator[ast.Expr]:
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            yield node.body[0]


def _code_of(source: str) -> str:
    """The source without docstrings, comment lines and runs of blank lines."""
    tree = _parse(source)
    if tree is None:
        return ""
    lines = source.expandtabs(4).splitlines()
    for statement in _docstrings(tree):
        for number in range(statement.lineno - 1, statement.end_lineno):
            lines[number] = ""
    kept = [line.rstrip() for line in lines if not line.lstrip().startswith("#")]
    return re.sub(r"\n{2,}", "\n\n", "\n".join(kept)).strip() + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    """The English paragraphs of a text, each on one line; what looks like code, a table or a list
    is left out.
    """
    for block in re.split(r"\n\s*\n", text):
        if ">>>" in block or "---" in block or "\n" in block and _LISTED.search(block):
            continue
        paragraph = _ROLE.sub(r"\1", " ".join(block.split())).replace("`", "")
        words = _WORD.findall(paragraph)
        letters = sum(map(len, words))
        if _ARGUMENTS.match(paragraph):
            continue
        if len(words) >= 8 and letters > 0.7 * len(paragraph) and _SENTENCE.match(paragraph):
            yield paragraph


def _prose_of(source: str) -> str:
    # Triple-quoted strings by pattern: twenty times faster than parsing, and what is not prose
    # falls out anyway.
    blocks = _TRIPLE_QUOTED.findall(source)
    blocks += [
        re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE)
        for block in _COMMENT_BLOCK.findall(source)
    ]
    return "\n".join(paragraph for block in blocks for paragraph in _paragraphs(block))


def _text_of(domain: str, source: Path | str) -> str:
    if isinstance(source, str):
        return "\n".join(_paragraphs(source))
    try:
        content = source.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
    return _code_of(content) if domain == "code" else _prose_of(content)


def _pieces(domain: str, text: str) -> list[str]:
    """What is deduplicated: paragraphs of prose, whole files of code."""
    return text.split("\n") if domain == "prose" else [text]


@cache
def _read(domain: str, split: str, limit_bytes: int) -> list[str]:
    # What a training file shares with a held-out one is dropped from training.
    heldout = [] if split == "heldout" else documents(domain, "heldout")
    seen = {piece for text in heldout for piece in _pieces(domain, text)}
    texts, size = [], 0
    # In the order of their hashes, so that a limit leaves a fair choice.
    for name, source in sorted(_sources(domain), key=lambda item: _digest(item[0])):
        if size < limit_bytes and (_digest(name) % _HELDOUT_ONE_IN == 0) == (split == "heldout"):
            pieces = dict.fromkeys(_pieces(domain, _text_of(domain, source)))
            fresh = [piece for piece in pieces if piece.strip() and piece not in seen]
            seen.update(fresh)
            if sum(map(len, fresh)) >= 200:
                texts.append("\n".join(fresh))
                size += len(texts[-1])
    return texts


def documents(domain: str, split: str, limit_bytes: int = 1 << 30) -> list[str]:
    """The texts of one domain and split, one for each file, in a fixed order, until they come to
    limit_bytes.
    """
    if domain not in DOMAINS or split not in SPLITS:
        raise ValueError(
            f"text: there is no {split!r} of {domain!r}; domains are {DOMAINS}, splits are {SPLITS}"
        )
    return _read(domain, split, limit_bytes)


def prompts(
    domain: str, n: int, tokens: int, tokenizer, seed: int, split: str = "heldout"
) -> list[list[int]]:
    """`n` prompts of `tokens` token ids each, cut at random places of the documents of one domain.

    The same arguments give the same prompts. Each starts at a line of code or a sentence, and no
    two at the same one, so that greedy continuations differ. Raises ValueError if the split has
    too little text.
    """
    rng = random.Random(f"{domain} {split} {seed}")
    starts = [
        (text, match.end())
        for text in documents(domain, split)
        for match in _STARTS[domain].finditer(text)
    ]
    rng.shuffle(starts)
    chosen: list[list[int]] = []
    for text, start in starts:
        if len(chosen) == n:
            break
        if len(text) - start < tokens:
            continue
        # A token is rarely more than twelve characters.
        ids = tokenizer(text[start : start + 12 * tokens], add_special_tokens=False)["input_ids"][
            :tokens
        ]
        if len(ids) == tokens:
            chosen.append(ids)
    if len(chosen) < n:
        raise ValueError(
            f"text: {split} {domain} gave {len(chosen)} prompts of {tokens} tokens, {n} were asked"
            " for; ask for fewer or for shorter ones"
        )
    return chosen
