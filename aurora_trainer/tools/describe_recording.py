"""Describe a recording, and one message of it, for `aurora-trainer inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from aurora_sglang_plugin.link import wire
from aurora_trainer.recordings.recording import CorruptionLog, read_messages, recording_files
from aurora_trainer.recordings.trace import Record
from aurora_trainer.terminal import columns, escape, moment, ranges, size
from aurora_trainer.tools.draw_tree import draw_tree

Name = Callable[[int], str]


@dataclass
class _Server:
    messages: int = 0
    target: str = ""
    first_sent: int = 0
    last_sent: int = 0
    # gaps in sent_seq since the recording heard of it
    lost: int = 0
    captured: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    requests: set[str] = field(default_factory=set)
    versions: set[int] = field(default_factory=set)
    first_s: float = 0.0
    last_s: float = 0.0


def describe_recording(path: Path) -> dict[str, Any]:
    """Everything that its messages say together.

    Damage is in `damaged`, by position, and the rest is described.
    """
    damage = CorruptionLog()
    servers: dict[str, _Server] = {}
    kinds: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    # steps by accept length
    lengths: Counter[int] = Counter()
    shapes: set[str] = set()
    domains: dict[tuple[str, str], str] = {}
    for record, message in read_messages(path, damage):
        header, arrays = message.header, message.arrays
        kinds[header.kind] += 1
        nbytes[header.kind] += sum(map(len, record.parts))
        server = servers.setdefault(
            header.session, _Server(first_sent=header.sent_seq, last_sent=header.sent_seq - 1)
        )
        server.messages += 1
        server.target = header.target
        server.lost += max(0, header.sent_seq - server.last_sent - 1)
        server.last_sent, server.captured = header.sent_seq, header.captured_seq
        server.dropped = header.dropped
        server.first_s = server.first_s or header.time_ns / 1e9
        server.last_s = max(server.last_s, header.time_ns / 1e9)
        server.requests.update(header.requests)
        domains.update(
            {(header.session, r): d for r, d in zip(header.requests, header.domains) if d}
        )
        ends.update(header.reasons)
        if header.kind == "prefill":
            totals["prompt_features"] += int(arrays["feature_lens"].sum())
        elif header.kind == "verify":
            server.versions.add(header.draft_version)
            lengths.update(arrays["feature_lens"].tolist())
            totals["altered_steps"] += sum(
                bool(f & wire.FLAG_ALTERED_DISTRIBUTION) for f in header.flags
            )
            nodes, kept, width = *arrays["topk_ids"].shape[1:], arrays["aux_hidden_states"].shape[1]
            shapes.add(
                f"steps {header.num_steps} topk {header.topk} nodes {nodes}, {kept} kept target"
                f" logits, features {width} {message.dtype('aux_hidden_states')}"
            )
    steps, tokens = lengths.total(), sum(length * count for length, count in lengths.items())
    deepest = max(lengths, default=1)
    reached = (
        [sum(c for length, c in lengths.items() if length > k) / steps for k in range(deepest)]
        if steps
        else []
    )
    files = recording_files(path)
    labels = Counter(domains.values())
    times = [(s.first_s, s.last_s) for s in servers.values()]
    return {
        "kind": "recording",
        "path": str(path),
        "files": len(files),
        "file_bytes": sum(file.stat().st_size for file in files),
        "oldest_files_removed": int(files[0].stem) if Path(path).is_dir() else 0,
        "messages": {kind: {"count": kinds[kind], "bytes": nbytes[kind]} for kind in wire.FRAMES},
        "first_unix_s": min((a for a, _ in times), default=None),
        "last_unix_s": max((b for _, b in times), default=None),
        "servers": {
            session: {
                "target": s.target,
                "messages": s.messages,
                "sent_before": s.first_sent - 1,
                "lost": s.lost,
                "captured": s.captured,
                "dropped": s.dropped,
                "requests": len(s.requests),
                "draft_versions": sorted(s.versions),
                "seconds": s.last_s - s.first_s,
            }
            for session, s in servers.items()
        },
        "requests": sum(len(s.requests) for s in servers.values()),
        "domains": dict(labels.most_common()),
        "ends": dict(ends),
        "prompt_features": totals["prompt_features"],
        "steps": steps,
        "tokens": tokens,
        "accept_length": tokens / steps if steps else None,
        # share of steps that accepted 1, 2, ... drafts
        "accepted_at_least": reached[1:],
        "altered_steps": totals["altered_steps"],
        "shapes": sorted(shapes),
        "damaged_records": damage.count,
        "damaged": damage.texts,
    }


def recording_text(found: dict[str, Any]) -> str:
    """`describe_recording` for people."""
    lines = [
        f"recording {escape(found['path'])}: {found['files']} files, {size(found['file_bytes'])}"
        + (
            f", {found['oldest_files_removed']} older files removed"
            if found["oldest_files_removed"]
            else ""
        )
    ]
    if found["first_unix_s"]:
        span = found["last_unix_s"] - found["first_unix_s"]
        lines.append(
            f"from {moment(found['first_unix_s'])} to {moment(found['last_unix_s'])}, {span:.0f} s"
        )
    lines += ["", *columns(["messages", "count", "size"], [
        [kind, str(of["count"]), size(of["bytes"])] for kind, of in found["messages"].items()
    ])]  # fmt: skip
    rows = []
    for session, of in found["servers"].items():
        dropped = (
            " ".join(f"{escape(cause)}={count}" for cause, count in of["dropped"].items()) or "0"
        )
        rows.append([
            escape(session, 20), escape(of["target"], 20), f"{of['seconds']:.0f} s",
            str(of["messages"]),
            str(of["requests"]), ranges(of["draft_versions"]), str(of["lost"]), dropped,
        ])  # fmt: skip
    head = [
        "server",
        "target",
        "time",
        "messages",
        "requests",
        "draft versions",
        "lost",
        "dropped by it",
    ]
    lines += ["", *columns(head, rows)]
    labels = ", ".join(
        f"{escape(name)} {count}" for name, count in list(found["domains"].items())[:20]
    )
    reasons = ", ".join(f"{name} {count}" for name, count in found["ends"].items())
    lines += [
        "",
        (
            f"requests {found['requests']}; by domain: {labels or 'no labels'}; ended by:"
            f" {reasons or 'none'}"
        ),
    ]
    if found["steps"]:
        lines.append(
            f"verify steps {found['steps']}, tokens {found['tokens']}, accept length"
            f" {found['accept_length']:.3f}; prompt features {found['prompt_features']}; steps"
            f" judged by another distribution {found['altered_steps']}"
        )
        shares = found["accepted_at_least"]
        rows = [
            [str(k + 1), f"{share:.3f}", f"{share / before:.3f}" if before else "-"]
            for k, (before, share) in enumerate(zip([1.0, *shares], shares))
        ]
        lines += columns(["draft", "accepted", "of those reached"], rows)
    lines += [f"trees: {shape}" for shape in found["shapes"]]
    lines += [f"damaged: {escape(text, 300)}" for text in found["damaged"]]
    return "\n".join(lines)


def message_at(path: Path, number: int) -> tuple[Record, wire.Message]:
    """The message `number`, counted from 0 over all files, whole ones only.

    Raises ValueError if there is none.
    """
    count = 0
    for record, message in read_messages(path, CorruptionLog()):
        if count == number:
            return record, message
        count += 1
    raise ValueError(f"{path} has no message {number}; expected one of 0 to {count - 1}")


def describe_message(record: Record, message: wire.Message, name: Name, top: int) -> dict[str, Any]:
    """Where it is, its header, its frames, and the trees of a verify message as lines of text."""
    header, arrays = message.header, message.arrays
    trees = []
    if header.kind == "verify":
        for row, request in enumerate(header.requests):
            length = int(arrays["feature_lens"][row])
            logits = _float32(arrays["topk_logits"][row], message.dtype("topk_logits"))
            drawn = draw_tree(
                arrays["draft_tokens"][row], arrays["parents"][row], arrays["accept_path"][row],
                length,
                arrays["next_tokens"][row], arrays["topk_ids"][row],
                np.exp(logits - arrays["logsumexp"][row][:, None]), name, top,
            )  # fmt: skip
            trees.append({
                "request": request, "position": int(arrays["positions"][row]),
                "accept_length": length,
                "altered": bool(header.flags[row] & wire.FLAG_ALTERED_DISTRIBUTION), "drawn": drawn,
            })  # fmt: skip
    fields = msgspec.to_builtins(header)
    frames = fields.pop("frames")
    small = {n: a.tolist() for n, a in arrays.items() if a.ndim == 1 and n not in ("input_ids",)}
    return {
        "kind": "message",
        "file": str(record.path),
        "record": record.record,
        "byte": record.offset,
        "header": fields,
        "frames": frames,
        "values": small,
        "trees": trees,
    }


def message_text(found: dict[str, Any]) -> str:
    """`describe_message` for people."""
    header = found["header"]
    lines = [
        f"{escape(header['kind'])} message: record {found['record']} at byte {found['byte']} of"
        f" {found['file']}"
    ]
    lines += [
        f"  {name} {_short(value)}" for name, value in header.items() if value not in ([], {})
    ]
    lines += ["", *columns(["frame", "dtype", "shape", "values"], [
        [f["name"], f["dtype"], "x".join(map(str, f["shape"])),
        _short(found["values"].get(f["name"], ""))]
        for f in found["frames"]
    ])]  # fmt: skip
    for tree in found["trees"]:
        lines += [
            "",
            f"request {escape(tree['request'])} at position {tree['position']}: accept length"
            f" {tree['accept_length']}"
            + (", judged by another distribution than the target's" if tree["altered"] else ""),
            *(f"  {line}" for line in tree["drawn"]),
        ]
    return "\n".join(lines)


def token_names(tokenizer: Path | None) -> Name:
    """A token's text in quotes, with its id if the text does not say all; without a tokenizer
    its id.
    """
    if tokenizer is None:
        return str
    from tokenizers import Tokenizer

    file = Path(tokenizer) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(
            f"--tokenizer {tokenizer}: no tokenizer.json there; expected the target's directory"
        )
    loaded = Tokenizer.from_file(str(file))

    def name(token: int) -> str:
        text = loaded.decode([token], skip_special_tokens=False)
        # a part of a character
        if not text or "\ufffd" in text:
            return f"<{token}>"
        return f'"{escape(text)}"'

    return name


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(escape(v) for v in value[:16]) + (
            f", … {len(value)} in all" if len(value) > 16 else ""
        )
    return escape(value, 200)


def _float32(array: np.ndarray, dtype: str) -> np.ndarray:
    return (
        (array.astype(np.uint32) << 16).view(np.float32)
        if dtype == "bfloat16"
        else array.astype(np.float32)
    )
