"""The bench on a real model and real chat: what its draft learns, and what that costs.

    python scripts/demo_real.py [--model DIRECTORY_OR_HUB_NAME] [--prompts FILE] [--greedy]

Makes an untrained draft whose vocabulary fits the prompts, starts the trainer and the server, and
sends chat requests through the OpenAI client, sampled as the server samples by default. Some of
them are then served by the frozen initial draft and by the target without speculation. Ends with a
summary and a picture. Ctrl-C leaves no process behind.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import children

MODEL = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
MODEL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]
NUM_STEPS = 3
# a longer prompt is left out
PROMPT_TOKENS = 512

LEARNING = """\
dtype = "bfloat16"
[trainer.pace]
new_positions_per_step = 128  # few requests: nearly a step for each of them
nice = 0  # two cores for all: a trainer that stands back would learn half as much
[trainer.batch]
max_positions = 1024
[trainer.buffer]
max_uses = 16
[trainer.optimizer]
lr = 5e-4
average = 0.98
[trainer.gate]
requests = 16
[trainer.publish]
every_s = 25.0  # the gate's walk over its requests takes seconds of a core
"""

# A share of the memory that is free at the start, and an upper bound: the KV cache has a size of
# its own. bfloat16 products are several times as fast as float32 ones on a CPU that has them.
CPU_ARGS = ["--mem-fraction-static", "0.8", "--dtype", "bfloat16"]
CPU_ENV = {
    # The second thread gains on matrices of this size; one that spins would take the trainer's
    # core.
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",
    "AURORA_CPU_PACK": "1",
    # A step's logits take 40 MB: pages that were given back to the system cost more than their use.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def main(options: argparse.Namespace, home: Path) -> None:
    # Seconds of imports, which Ctrl-C may interrupt.
    from clients import chat
    from passes import Site, write_config
    from serve import has_gpu
    from summary import report

    try:
        target = find_model(options.model)
        known, prompts, fresh = make_prompts(options, target)
    except (ValueError, OSError) as error:
        sys.exit(f"demo-real: {error}")
    # what was learned before
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    draft = make_draft(options, target, known, home)
    on_gpu = has_gpu()
    config = write_config(home, target, draft, LEARNING)
    servers = {} if on_gpu else dict(args=CPU_ARGS, env=CPU_ENV)
    name = target.name if Path(options.model).is_dir() else options.model
    site = Site(name, home, target, draft, config, NUM_STEPS, clients=options.clients, **servers)
    traffic = dict(
        tokens=options.max_tokens,
        greedy=options.greedy,
        concurrency=options.clients,
        turns=options.turns,
    )

    print(
        f"live: AURORA and the trainer, {len(prompts)} chat requests (logs in {home})", flush=True
    )
    live = site.live(
        lambda server: chat(server, prompts, **traffic, pause_s=options.pause), str(len(prompts))
    )
    every, frozen, learned, plain = options.frozen_every, None, None, None
    if not options.no_frozen:
        some = prompts[::every]
        which = f"{len(some)} of the same requests"
        print(f"\nfrozen: {which}, the initial draft, no trainer", flush=True)
        frozen = site.frozen(lambda server: chat(server, some, **traffic), str(len(some)))
        if fresh:
            print(f"\nlearned: {len(fresh)} new requests, the last version, no trainer", flush=True)
            learned = site.learned(lambda server: chat(server, fresh, **traffic), str(len(fresh)))
        print(f"\nplain: {which}, no speculation", flush=True)
        plain = site.plain(lambda server: chat(server, some, **traffic), str(len(some)))
    how = "greedy" if options.greedy else "the server's defaults"
    report(
        site,
        live,
        frozen,
        learned,
        plain,
        init=options.init,
        tokens=options.max_tokens,
        sampling=how,
        every=every,
    )


def find_model(name: str) -> Path:
    """The directory of a model: the name itself, or its snapshot from the Hugging Face hub.

    Raises ValueError.
    """
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=MODEL_FILES))
    except Exception as error:
        raise ValueError(
            f"model {name}: no such directory, and the Hugging Face hub did not give it "
            f"({type(error).__name__}); expected a directory, or a name on the hub and a network"
        ) from None


def make_prompts(options: argparse.Namespace, target: Path) -> tuple[list, list, list]:
    """All prompts that are known, those of the live pass, and others that nothing was learned
    from. Raises ValueError, OSError.
    """
    from chat_prompts import built_in_prompts, choose, read_prompts
    from tokenizers import Tokenizer

    file = target / "tokenizer.json"
    if not file.exists():
        raise ValueError(f"{target} has no tokenizer.json; expected a model with a fast tokenizer")
    tokenizer = Tokenizer.from_file(str(file))
    known = read_prompts(options.prompts) if options.prompts else built_in_prompts()
    more = options.requests // options.frozen_every
    live, fresh = choose(
        known, options.requests, more, lambda text: len(tokenizer.encode(text).ids) <= PROMPT_TOKENS
    )
    return known, live, fresh


def make_draft(options: argparse.Namespace, target: Path, known: list, home: Path) -> Path:
    """An untrained draft for the most frequent tokens of all prompts, then the first."""
    import json

    texts, counts, draft = home / "prompts.txt", home / "counts.json", home / "draft"
    texts.write_text("\n".join(prompt.text for prompt in known))
    size = min(options.draft_vocab, json.loads((target / "config.json").read_text())["vocab_size"])
    count = [*children.TRAINER, "prune-vocab", target, "--text", texts, "--counts", counts]
    children.run_to_end([*count, "--sizes", str(size)])
    make = [
        *children.TRAINER,
        "init-draft",
        target,
        draft,
        "--kind",
        options.init,
        "--draft-vocab",
        str(size),
    ]
    children.run_to_end([*make, "--counts", counts])
    return draft


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model", default=MODEL, help=f"a directory, or a name on the hub; default {MODEL}"
    )
    parser.add_argument(
        "--prompts", type=Path,
        help="JSON objects with text and perhaps domain, or a prompt a line; default: about Python",
    )  # fmt: skip
    parser.add_argument("--requests", type=int, default=250, help="of the live pass")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    parser.add_argument(
        "--turns", type=int, default=1, help="of a conversation: each repeats what was said before"
    )
    parser.add_argument(
        "--pause", type=float, default=0.0,
        help="seconds that a user of the live pass reads an answer before the next question",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=96, help="of an answer")
    parser.add_argument(
        "--greedy",
        action="store_true",
        help="temperature 0 and no penalty, not the server's defaults",
    )
    parser.add_argument(
        "--init",
        choices=("random", "target"),
        default="target",
        help="how the untrained draft starts",
    )
    parser.add_argument(
        "--draft-vocab", type=int, default=16384, help="tokens that the draft can propose"
    )
    parser.add_argument(
        "--frozen-every", type=int, default=4, help="the other passes serve 1 in so many requests"
    )
    parser.add_argument("--no-frozen", action="store_true", help="leave out the other passes")
    parser.add_argument(
        "--home", type=Path, default=Path(".cache"), help="where everything is kept"
    )
    return parser.parse_args()


if __name__ == "__main__":
    OPTIONS = arguments()
    HOME = OPTIONS.home.resolve() / "demo-real"
    children.until_interrupted(lambda: main(OPTIONS, HOME), HOME)
