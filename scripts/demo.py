"""The main job, end to end: a real SGLang server whose untrained draft learns while it serves.

    python scripts/demo.py [--init random|target|none] [--minutes 10]

Makes an untrained draft, starts the trainer and the server, sends code prompts, then prose prompts,
and shows how the accept length climbs, dips and climbs again. A second
pass serves the same requests with the frozen initial draft and the trainer off, a third one new
requests with the last version, a fourth one without speculation. Ends with a summary and a picture.
Ctrl-C leaves no process behind.
"""

from __future__ import annotations

import argparse
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import children

# what `make_target.py --out scripts/target` makes
TARGET = Path(__file__).with_name("target")
NUM_STEPS = 4
PROMPT_TOKENS, TOKENS = 48, 128
# the third pass serves 1 in so many requests of the second
PLAIN_EVERY = 4
# share of the time after which the traffic changes its domain
SHIFT_AT = 0.6

# A small draft on few requests learns by the step, 4 of them a request.
# The rate is for widths of a few hundred.
LEARNING = """\
[trainer.pace]
new_positions_per_step = 32
[trainer.batch]
max_positions = 256
[trainer.optimizer]
lr = 3e-3
[trainer.publish]
every_s = 5.0
"""


def main(options: argparse.Namespace, home: Path) -> None:
    # Seconds of imports, which Ctrl-C may interrupt.
    from clients import send
    from passes import Site, write_config
    from summary import report

    target = options.target.resolve()
    # what was learned before
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    draft = None if options.init == "none" else home / "draft"
    if draft:
        made = ["init-draft", target, draft, "--kind", options.init]
        children.run_to_end([*children.TRAINER, *made])
    config = write_config(home, target, draft, LEARNING)
    site = Site("the demo's target", home, target, draft, config, NUM_STEPS)
    prompts = make_prompts(target, options.requests)

    def stretches(server) -> Iterator:
        for domain, share in (("code", SHIFT_AT), ("prose", 1 - SHIFT_AT)):
            over = threading.Event()
            timer = threading.Timer(options.minutes * 60 * share, over.set)
            timer.daemon = True
            timer.start()
            yield from send(server, prompts[domain], tokens=TOKENS, until=over, domain=domain)
            timer.cancel()

    print(
        f"live: AURORA and the trainer, {options.minutes:g} minutes of traffic (logs in {home})",
        flush=True,
    )
    live = site.live(stretches, f"{options.minutes:g} minutes")
    if site.last is None:
        raise SystemExit("demo: no version was published yet; give it more --minutes")
    shift = sum(reply.domain == "code" for reply in live.replies)
    counts = {"code": shift, "prose": len(live.replies) - shift}
    every, frozen, learned, plain = options.frozen_every, None, None, None

    def again(server, every: int) -> Iterator:
        for domain, count in counts.items():
            yield from send(server, prompts[domain][:count:every], tokens=TOKENS, domain=domain)

    if draft and not options.no_frozen:
        print(
            f"\nfrozen: 1 in {every} of the same requests, the initial draft, no trainer",
            flush=True,
        )
        frozen = site.frozen(lambda server: again(server, every), str(len(live.replies) // every))
    if not options.no_frozen:
        few = every * PLAIN_EVERY
        fresh = prompts["prose"][counts["prose"] :][: len(live.replies) // few]
        print(f"\nlearned: {len(fresh)} new requests, the last version, no trainer", flush=True)
        learned = site.learned(
            lambda server: send(server, fresh, tokens=TOKENS, domain="prose"), str(len(fresh))
        )
        print(f"\nplain: 1 in {few} of the same requests, no speculation", flush=True)
        plain = site.plain(lambda server: again(server, few), str(len(live.replies) // few))
    report(
        site,
        live,
        frozen,
        learned,
        plain,
        init=options.init,
        tokens=TOKENS,
        sampling="greedy",
        shift=shift,
        every=every,
    )


def make_prompts(target: Path, count: int) -> dict[str, list[list[int]]]:
    """So many prompts of token ids for each domain."""
    import text
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    return {
        domain: text.prompts(domain, count, PROMPT_TOKENS, tokenizer, seed=2)
        for domain in text.DOMAINS
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--init",
        choices=("random", "target", "none"),
        default="random",
        help="how the untrained draft starts; none: the server starts without, the trainer makes"
        " one and the server chooses when to draft",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of live traffic")
    parser.add_argument(
        "--requests", type=int, default=4000, help="prompts of each domain to choose from"
    )
    parser.add_argument(
        "--home", type=Path, default=Path(".cache"), help="where everything is kept"
    )
    parser.add_argument(
        "--target", type=Path, default=TARGET, help="such as one of make_target.py; default: ours"
    )
    parser.add_argument(
        "--frozen-every",
        type=int,
        default=4,
        help="the frozen pass serves 1 in so many requests: it is slow, and flat",
    )
    parser.add_argument(
        "--no-frozen", action="store_true", help="leave out the passes after the first"
    )
    return parser.parse_args()


if __name__ == "__main__":
    OPTIONS = arguments()
    HOME = OPTIONS.home.resolve() / f"demo-{OPTIONS.init}"
    children.until_interrupted(lambda: main(OPTIONS, HOME), HOME)
