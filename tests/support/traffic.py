"""Wire messages of a make-believe server whose text can be learnt: the next token is a fixed
permutation of the last.

Chain trees of S draft steps that accept at random; features are a fixed random row for each token;
the target's kept logits are peaked at the true next token. Used where the trainer's loop is under
test, not what it assembles.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch

from aurora_sglang_plugin.link import wire
from aurora_trainer.recordings.trace import TraceWriter

S, K = 2, 4
# of the target, if it matters
VOCAB, HIDDEN = 64, 32
STEP_NS = 1_000_000


def messages(
    *,
    target: str,
    vocab: int,
    features: int,
    requests: int,
    session: str = "e",
    seed: int = 0,
    outputs: int = 24,
    domain: str = "",
    flag: int = 0,
) -> Iterator[list[bytes]]:
    """Parts of prefill, verify and end messages of `requests` requests of about `outputs` tokens,
    one after another.
    """
    rng = random.Random(seed)
    follow = torch.randperm(vocab, generator=torch.Generator().manual_seed(1)).tolist()
    table = torch.randn(vocab, features, generator=torch.Generator().manual_seed(2)).numpy()
    sent = 0

    def send(kind: str, request: str, arrays: dict, **fields) -> list[bytes]:
        nonlocal sent
        sent += 1
        header = wire.Header(
            schema=wire.SCHEMA_VERSION, kind=kind, session=session, captured_seq=sent,
            sent_seq=sent,
            heartbeats=0,
            dropped={}, queued=0, target=target, draft_version=0, extend_version=0,
            time_ns=sent * STEP_NS,
            requests=[request], domains=[domain] if domain and kind != "verify" else [], **fields,
        )  # fmt: skip
        return [bytes(part) for part in wire.encode(header, arrays)]

    for number in range(requests):
        rid, text = f"{session}-{number}", [rng.randrange(vocab)]
        while len(text) < 8 + outputs + 2 * S + 2:
            text.append(follow[text[-1]])
        yield send("prefill", rid, {
            "positions": _i32([0]), "extend_lens": _i32([8]), "feature_lens": _i32([8]),
            "prompt_lens": _i32([8]),
            "input_ids": _i32(text[:8]), "next_tokens": _i32([text[8]]),
            "aux_hidden_states": ("float32", table[text[:8]]),
        })  # fmt: skip
        root = 8
        while root < 8 + outputs:
            accepted = rng.randint(0, S)
            drafted = [text[root], *text[root + 1 : root + 1 + accepted]]
            drafted += [(drafted[-1] + 1) % vocab] * (S + 1 - len(drafted))
            if accepted < S and drafted[accepted + 1] == text[root + accepted + 1]:
                drafted[accepted + 1] = (drafted[accepted + 1] + 1) % vocab
            ids = [[follow[t], *(((follow[t] + j) % vocab) for j in range(1, K))] for t in drafted]
            path = text[root : root + accepted + 1]
            yield send("verify", rid, {
                "positions": _i32([root]), "draft_tokens": _i32([drafted]),
                "parents": _i32([list(range(-1, S))]),
                "accept_path": _i32([[*range(accepted + 1), *[-1] * (S - accepted)]]),
                "feature_lens": _i32([accepted + 1]),
                "next_tokens": _i32([[*text[root + 1 : root + accepted + 2],
                *[0] * (S - accepted)]]),
                "aux_hidden_states": ("float32", table[path]),
                "topk_ids": _i32([ids]),
                "topk_logits": ("float32",
                np.tile(np.array([4, 1, 0, -1], np.float32), (1, S + 1, 1))),
                "logsumexp": ("float32", np.full((1, S + 1), 4.2, np.float32)),
            }, num_steps=S, topk=1, flags=[flag])  # fmt: skip
            root += accepted + 1
        yield send("end", rid, {"committed_lens": _i32([root])}, reasons=["length"])


def write_trace(path, **about) -> int:
    """Write `messages` to a trace; returns how many."""
    writer, count = TraceWriter(path), 0
    for parts in messages(**about):
        writer.write(parts)
        count += 1
    writer.close()
    return count


def _i32(values) -> tuple[str, np.ndarray]:
    return "int32", np.array(values, np.int32)
