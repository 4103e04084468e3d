"""Traffic of the demos and benchmarks: concurrent requests over HTTP, results as they finish."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from serve import Server

# requests at a time
CLIENTS = 8
SPEC_COUNTS = ("spec_verify_ct", "spec_num_correct_drafts")
# What users say next, in a conversation of several turns.
FOLLOW_UPS = ("Explain that in more detail.", "Give me an example.", "Sum it up in one sentence.")
GREEDY = {"temperature": 0.0, "extra_body": {"repetition_penalty": 1.0}}


@dataclass(frozen=True)
class Prompt:
    """What a user says, and a label for the kind of it."""

    domain: str
    text: str


@dataclass
class Reply:
    """One finished request."""

    # its place in the list of prompts
    number: int
    domain: str
    tokens: list[int] = field(repr=False)
    # 1 + correct drafts per verify step; 1.0 without speculation
    accept_length: float
    latency_s: float = 0.0
    # of time.monotonic()
    finished_s: float = 0.0


def send(
    server: Server,
    prompts: Sequence[list[int]],
    *,
    tokens: int | Sequence[int] = 128,
    concurrency: int = CLIENTS,
    until: threading.Event | None = None,
    domain: str | None = None,
) -> Iterator[Reply]:
    """Yield a Reply for every prompt of token ids, decoded greedily, in the order in which they
    finish. `until`: send no more once it is set. `domain`: a label that the requests carry, for
    `aurora-trainer eval`.

    Output always has `tokens` tokens (one number for all, or one for each): the end of text is
    ignored, so that no request weighs more for what was said. Raises the first error of any
    request.
    """
    params: dict[str, Any] = {"ignore_eos": True}
    if domain:
        params["custom_params"] = {"aurora_domain": domain}

    def ask(number: int) -> Reply:
        length = tokens if isinstance(tokens, int) else tokens[number]
        answer = server.generate(prompts[number], params | {"max_new_tokens": length})
        return Reply(
            number, domain or "", answer["output_ids"], _accept_length(answer["meta_info"])
        )

    return _concurrently(ask, len(prompts), concurrency, until)


def chat(
    server: Server,
    prompts: Sequence[Prompt],
    *,
    tokens: int,
    greedy: bool = False,
    concurrency: int = CLIENTS,
    turns: int = 1,
    pause_s: float = 0.0,
) -> Iterator[Reply]:
    """The same for users of /v1/chat/completions, through the OpenAI client. Nothing that decides
    the output is set but its largest length: the server's own defaults sample, unless `greedy`.

    turns: what a user says, with everything said before it, so that the cached prefix grows; a
        Reply is of the whole conversation.
    pause_s: how long a user reads an answer before the next question.
    """
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=1800)
    setting = GREEDY if greedy else {}
    # What the answer says of itself.
    report = {"return_spec_tokens_details": True, "return_output_ids_in_sglext": True}

    def ask(number: int) -> Reply:
        prompt = prompts[number]
        label = {"custom_params": {"aurora_domain": prompt.domain}}
        messages, ids, counts = [], [], Counter()
        for said in (prompt.text, *islice(cycle(FOLLOW_UPS), turns - 1)):
            messages.append({"role": "user", "content": said})
            answer = client.chat.completions.create(
                model="default",
                messages=messages,
                max_tokens=tokens,
                **setting | {"extra_body": setting.get("extra_body", {}) | report | label},
            )
            about = answer.model_extra["sglext"]
            ids += about["output_ids"][0]
            details = about.get("spec_tokens_details") or {}
            counts.update({name: details.get(name) or 0 for name in SPEC_COUNTS})
            content = answer.choices[0].message.content or ""
            messages.append({"role": "assistant", "content": content})
        return Reply(number, prompt.domain, ids, _accept_length(counts))

    return _concurrently(ask, len(prompts), concurrency, None, pause_s)


def tokens_per_s(replies: Sequence[Reply], concurrency: int, last: int | None = None) -> float:
    """The rate of all requests, or of the `last` ones, while every client was busy, so that passes
    of any length compare: from the finish of the first few requests to that of the last few,
    `concurrency` of each (of all, if they are few)."""
    end = len(replies) - concurrency
    first = max(concurrency, end - last if last else 0)
    if end <= first:
        first, end = 0, len(replies)
    if not end:
        return 0.0
    began = min(r.finished_s - r.latency_s for r in replies)
    seconds = replies[end - 1].finished_s - (replies[first - 1].finished_s if first else began)
    return sum(len(r.tokens) for r in replies[first:end]) / max(seconds, 1e-9)


def _accept_length(counts: dict[str, Any]) -> float:
    steps = counts.get("spec_verify_ct") or 0
    return 1 + counts["spec_num_correct_drafts"] / steps if steps else 1.0


def _concurrently(
    ask: Callable[[int], Reply],
    count: int,
    concurrency: int,
    until: threading.Event | None,
    pause_s: float = 0.0,
) -> Iterator[Reply]:
    """`ask` for each number, from so many threads; times are filled in here."""
    results: queue.Queue[Reply | BaseException | None] = queue.Queue()
    numbers = iter(range(count))
    lock = threading.Lock()
    stop = until or threading.Event()

    def worker() -> None:
        try:
            while not stop.is_set():
                with lock:
                    number = next(numbers, None)
                if number is None:
                    break
                start = time.monotonic()
                reply = ask(number)
                now = time.monotonic()
                reply.latency_s, reply.finished_s = now - start, now
                results.put(reply)
                stop.wait(pause_s)
        except BaseException as error:
            results.put(error)
        finally:
            results.put(None)

    for _ in range(concurrency):
        threading.Thread(target=worker, daemon=True).start()
    running = concurrency
    try:
        while running:
            result = results.get()
            if result is None:
                running -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                yield result
    finally:
        stop.set()
