"""A server that exists only as messages, and knows the truth: what every position and every tree of
them was.

Everything that the assembler has to survive happens at random: chunked prefill, prefix-cache hits,
prompt features limited to a chunk's tail, mixed chunks, early stops within an accepted path, fewer
tokens committed than accepted, retraction and re-prefill, an extra verify step after the end, ids
that are used again, messages that never arrive.

Token x[p] of request number i is token(i, p); its feature is [i, p, x[p]]; a node's logsumexp is
its tree's number times 64 plus its index on the wire. So each value of a sample says where it must
have come from.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

import numpy as np

from aurora_sglang_plugin.link import wire

S, N, K = 3, 8, 2
P = S + 1


def token(number: int, position: int) -> int:
    """Out of three, so that wrong stitches often look right by their tokens; the features tell."""
    return zlib.crc32(f"{number} {position}".encode()) % 3


@dataclass
class Tree:
    # of the request
    number: int
    root: int
    tokens: list[int]
    parents: list[int]
    path: list[int]
    version: int
    altered: bool
    # tokens of the path, bonus included; fewer than accepted after a truncation
    committed: int = 0


@dataclass
class Request:
    number: int
    rid: str
    prompt_len: int
    # prompt and output that the client gets
    total_len: int
    # next position to prefill
    chunks_from: int = 0
    # tokens known: x[0..known-1]
    known: int = 0
    running: bool = False
    committed: int = 0
    # one per (re-)prefill: first feature, trees, plain positions
    lives: list[dict] = field(default_factory=list)


class Server:
    """run() yields every message (a lost one as None) that serving `requests` requests sends."""

    def __init__(
        self,
        seed: int,
        *,
        requests: int = 12,
        lose: float = 0.0,
        odd: bool = True,
        session: str = "e",
    ):
        self.draw = random.Random(seed)
        self.lose, self.odd, self.session = lose, odd, session
        self.trees: dict[int, Tree] = {}
        self.requests = [self._request(i) for i in range(requests)]
        self.captured = 0
        self.version = 1

    def _request(self, number: int) -> Request:
        prompt = self.draw.randint(1, 30)
        # ids come again, one life after the other
        rid = f"r{number % 5}" if self.odd else f"r{number}"
        return Request(number, rid, prompt, prompt + self.draw.randint(1, 60))

    def run(self):
        waiting, running = list(self.requests), []
        while waiting or running:
            self.version += self.draw.random() < 0.1
            busy = {r.rid for r in running}
            if (
                waiting
                and waiting[0].rid not in busy
                and len(running) < 4
                and self.draw.random() < 0.5
            ):
                running.append(waiting.pop(0))
            prefilling = [r for r in running if not r.running]
            generating = [r for r in running if r.running]
            if prefilling and self.draw.random() < 0.6:
                mixed = generating if self.odd and self.draw.random() < 0.3 else []
                yield self._prefill(prefilling[: self.draw.randint(1, 2)], mixed)
            elif generating:
                yield self._verify(generating)
            for r in generating:
                if r.known >= r.total_len:
                    yield from self._finish(r)
                    running.remove(r)
                elif self.odd and self.draw.random() < 0.02:
                    r.running, r.committed = False, r.known
                    yield self._end(r, "retract", r.known)
                    r.chunks_from = 0

    def _finish(self, r: Request):
        """The step that passed total_len was one of accepted tokens; `end` names what the client
        got.
        """
        reason = self.draw.choice(["stop", "length", "abort"])
        r.committed = r.total_len
        extra = self.draw.choice(["before", "after", "none"]) if self.odd else "none"
        if extra == "before":
            yield self._verify([r])
        yield self._end(r, reason, r.total_len)
        if extra == "after":
            yield self._verify([r])

    # ---- messages

    def _send(self, kind, requests, arrays, **fields):
        self.captured += 1
        header = wire.Header(
            schema=wire.SCHEMA_VERSION, kind=kind, session=self.session, captured_seq=self.captured,
            sent_seq=self.captured,
            heartbeats=0, dropped={}, queued=0, target="t", draft_version=self.version,
            extend_version=self.version,
            time_ns=self.captured, requests=[r.rid for r in requests], **fields,
        )  # fmt: skip
        parts = [bytes(part) for part in wire.encode(header, arrays)]
        return None if self.draw.random() < self.lose else wire.decode(parts, max_bytes=1 << 20)

    def _prefill(self, prefilling: list[Request], mixed: list[Request]):
        rows = []
        for r in prefilling:
            # after a retraction the output is prefilled as well
            goal = max(r.prompt_len, r.known)
            if r.chunks_from == 0:
                hit = self.draw.randrange(goal) if self.draw.random() < 0.4 else 0
                r.chunks_from = hit
                r.lives.append({"first": hit, "trees": [], "goal": goal})
            length = self.draw.randint(1, goal - r.chunks_from)
            count = (
                self.draw.randint(0, length) if self.odd and self.draw.random() < 0.15 else length
            )
            if count < length:
                r.lives[-1]["first"] = r.chunks_from + length - count
            rows.append((r, r.chunks_from, length, count))
            r.chunks_from += length
            if r.chunks_from == goal:
                r.running, r.known = True, goal + 1
        for r in mixed:
            rows.append((r, r.known - 1, 1, 1))
            r.known += 1
        spans = [
            (r, range(p, p + length), range(p + length - count, p + length))
            for r, p, length, count in rows
        ]
        return self._send("prefill", [row[0] for row in rows], {
            "positions": _i32([row[1] for row in rows]),
            "extend_lens": _i32([row[2] for row in rows]),
            "feature_lens": _i32([row[3] for row in rows]),
            "prompt_lens": _i32([row[0].prompt_len for row in rows]),
            "input_ids": _i32([token(r.number, p) for r, span, _ in spans for p in span]),
            "next_tokens": _i32([token(r.number, span.stop) for r, span, _ in spans]),
            "aux_hidden_states": _features([(r.number, p) for r, _, span in spans for p in span]),
        })  # fmt: skip

    def _verify(self, requests: list[Request]):
        trees = [self._tree(r) for r in requests]
        lens = [len(tree.path) for tree in trees]
        altered = [int(tree.altered) for tree in trees]
        numbers = [number for number, tree in self.trees.items() if tree in trees]
        message = self._send("verify", requests, {
            "positions": _i32([tree.root for tree in trees]),
            "draft_tokens": _i32([tree.tokens for tree in trees]),
            "parents": _i32([tree.parents for tree in trees]),
            "accept_path": _i32([tree.path + [-1] * (P - len(tree.path)) for tree in trees]),
            "feature_lens": _i32(lens),
            "next_tokens": _i32([[token(t.number,
            t.root + 1 + k) for k in range(P)] for t in trees]),
            "aux_hidden_states": _features([(t.number,
            t.root + k) for t in trees for k in range(len(t.path))]),
            "topk_ids": _i32([[[n * N + i, 1] for i in range(N)] for n in numbers]),
            "topk_logits": ("float32", np.zeros((len(trees), N, K), np.float32)),
            "logsumexp": ("float32", np.array([[n * 64 + i + 1 for i in range(N)] for n in numbers],
            np.float32)),
        }, num_steps=S, topk=2, flags=altered)  # fmt: skip
        for r, tree, count in zip(requests, trees, lens):
            truncated = (
                self.draw.randint(0, count - 1) if self.odd and self.draw.random() < 0.1 else 0
            )
            tree.committed = count - truncated
            r.known += tree.committed
        return message

    def _tree(self, r: Request) -> Tree:
        root, parents, depth = r.known - 1, [-1], [0]
        for _ in range(N - 1):
            parent = self.draw.choice([i for i, d in enumerate(depth) if 0 <= d < S])
            unused = self.odd and self.draw.random() < 0.15
            parents.append(-2 if unused else parent)
            depth.append(-1 if unused else depth[parent] + 1)
        path = [0]
        while (
            children := [i for i in range(N) if parents[i] == path[-1]]
        ) and self.draw.random() < 0.7:
            path.append(self.draw.choice(children))
        tokens = [3 + self.draw.randrange(1000) for _ in range(N)]
        for k, node in enumerate(path):
            tokens[node] = token(r.number, root + k)
        tree = Tree(r.number, root, tokens, parents, path, self.version, self.draw.random() < 0.1)
        self.trees[len(self.trees)] = tree
        # else the extra step of a request that ended
        if "reason" not in r.lives[-1]:
            r.lives[-1]["trees"].append(len(self.trees) - 1)
        return tree

    def _end(self, r: Request, reason: str, committed: int):
        r.lives[-1] |= {"reason": reason, "committed": committed}
        return self._send("end", [r], {"committed_lens": _i32([committed])}, reasons=[reason])


def _i32(values) -> tuple[str, np.ndarray]:
    return "int32", np.array(values, np.int32)


def _features(rows) -> tuple[str, np.ndarray]:
    return "float32", np.array([(i, p, token(i, p)) for i, p in rows], np.float32).reshape(-1, 3)
