"""Live traffic for the demo and the benchmarks: concurrent greedy requests over HTTP, results as they finish."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from serve import Server


@dataclass
class Reply:
    """One finished request."""

    number: int  # its place in the list of prompts
    tokens: list[int] = field(repr=False)
    accept_length: float  # 1 + correct drafts per verify step; 1.0 without speculation
    latency_s: float
    finished_s: float  # since the traffic began


def send(
    server: Server,
    prompts: Sequence[list[int]],
    *,
    tokens: int = 128,
    concurrency: int = 8,
    until: threading.Event | None = None,
    domain: str | None = None,
) -> Iterator[Reply]:
    """Yield a Reply for every prompt, in the order in which they finish. `until`: send no more once it is set.
    `domain`: a label that the requests carry, for `aurora-trainer eval`.

    Output always has `tokens` tokens: the end of text is ignored, so that every request weighs the same.
    Raises the first error of any request.
    """
    results: queue.Queue[Reply | BaseException | None] = queue.Queue()
    numbers = iter(range(len(prompts)))
    lock = threading.Lock()
    began = time.monotonic()
    stop = until or threading.Event()
    params = {"max_new_tokens": tokens, "ignore_eos": True}
    if domain:
        params["custom_params"] = {"aurora_domain": domain}

    def worker() -> None:
        try:
            while not stop.is_set():
                with lock:
                    number = next(numbers, None)
                if number is None:
                    break
                start = time.monotonic()
                answer = server.generate(prompts[number], params)
                now, meta = time.monotonic(), answer["meta_info"]
                steps = meta.get("spec_verify_ct") or 0
                length = 1 + meta["spec_num_correct_drafts"] / steps if steps else 1.0
                results.put(Reply(number, answer["output_ids"], length, now - start, now - began))
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
