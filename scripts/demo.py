"""The main job, end to end: a real SGLang server whose untrained draft learns from the traffic that it serves.

    python scripts/demo.py [--init random] [--minutes 10]

Makes the target if there is none, an untrained draft, starts the trainer and the server, sends code prompts, then prose
prompts, and shows how the accept length climbs, dips and climbs again. A second pass serves the same requests with the
frozen initial draft and the trainer off. Ends with a summary and a picture. Ctrl-C leaves no process behind.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import curve
import make_target
import text
from serve import Server, die_with_parent, free_port
from traffic import Reply, send

NUM_STEPS = 4
PROMPT_TOKENS = 48
WINDOW = 40  # requests in a mean
SHIFT_AT = 0.6  # share of the time after which the traffic changes its domain
TRAINER = [str(Path(sys.executable).with_name("aurora-trainer"))]
SWAP = re.compile(r"draft swapped version=(\d+)")

CONFIG = """\
[link]
endpoint = "tcp://127.0.0.1:{port}"
[weights]
directory = "{home}/weights"
[trainer.model]
target = "{target}"
draft = "{draft}"
[trainer.pace]
new_slots_per_step = 32  # 4 steps a request: a small draft on few requests learns by the step
[trainer.batch]
max_slots = 256
[trainer.optimizer]
lr = 3e-3  # for widths of a few hundred; a wider draft wants less
[trainer.publish]
every_s = 5.0
[trainer.checkpoint]
directory = "{home}/checkpoints"
[trainer.metrics]
status_file = "{home}/status.json"
every_s = 1.0
"""


class Trainer:
    """`aurora-trainer run` in a subprocess that ends with this one."""

    def __init__(self, config: Path, log: Path, *arguments: str):
        command = [*TRAINER, "run", "--config", str(config), *arguments]
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=die_with_parent
            )

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Progress:
    """One line that tells what happens, and the request at which each swap happened (read from the server's log)."""

    def __init__(self, server: Server, status_file: Path | None = None, total_s: float = 0):
        self.server, self.status_file = server, status_file
        self.of = f" of {total_s:.0f}" if total_s else ""
        self.lengths: list[float] = []
        self.swaps: list[int] = []
        self.tokens = self.version = 0
        self._read = 0
        self._began = self._shown = time.monotonic()

    def add(self, reply: Reply, domain: str) -> None:
        self.lengths.append(reply.accept_length)
        self.tokens += len(reply.tokens)
        self._notice_swaps()
        now = time.monotonic()
        if now - self._shown > 2:
            self._shown = now
            print(self._line(domain, now), end="\r" if sys.stdout.isatty() else "\n", flush=True)

    def _line(self, domain: str, now: float) -> str:
        recent = self.lengths[-WINDOW:]
        status = json.loads(self.status_file.read_text()) if self.status_file and self.status_file.exists() else {}
        dropped = sum(status.get("dropped", {}).values())
        return (
            f"  {now - self._began:4.0f} s{self.of}  {domain:5}  {len(self.lengths):4} requests  "
            f"{self.tokens / (now - self._began):5.0f} tokens/s  accept length {sum(recent) / len(recent):.2f}  "
            f"draft v{self.version}  optimizer step {status.get('optimizer_step', 0)}  "
            f"dropped {dropped}  lost {status.get('lost', 0)}   "
        )

    def _notice_swaps(self) -> None:
        with open(self.server.log, errors="replace") as file:
            file.seek(self._read)
            lines = file.read()
            self._read = file.tell()
        for version in SWAP.findall(lines):
            self.version = int(version)
            self.swaps.append(len(self.lengths))


def main() -> None:
    options = arguments()
    home = options.home.resolve()
    target = home / ("target-quick" if options.quick else "target")
    recipe = make_target.QUICK if options.quick else make_target.Recipe()
    if not make_target.is_ready(recipe, target):
        make_target.make(recipe, target)
    run = home / f"demo-{options.init}"
    shutil.rmtree(run, ignore_errors=True)  # what was learned before; the target stays
    run.mkdir(parents=True)
    draft = run / "draft"
    subprocess.run([*TRAINER, "init-draft", str(target), str(draft), "--kind", options.init], check=True)
    config = run / "aurora.toml"
    config.write_text(CONFIG.format(port=free_port(), home=run, target=target, draft=draft))
    prompts = make_prompts(target, options.requests)

    print(f"live: AURORA and the trainer, {options.minutes:g} minutes of traffic (logs in {run})", flush=True)
    serve = dict(algorithm="AURORA", num_steps=NUM_STEPS, draft=draft)
    with (
        Trainer(config, run / "trainer.log") as trainer,
        Server(target, **serve, env={"AURORA_CONFIG": str(config)}, log=run / "server.log") as server,
    ):
        live, replies, shift = serve_live(server, prompts, run / "status.json", options.minutes * 60)
        if trainer.process.poll() is not None:
            sys.exit(f"the trainer ended with {trainer.process.returncode}; see {run / 'trainer.log'}")
    frozen: list[float] = []
    if not options.no_frozen:
        which = f"1 in {options.frozen_every} of " if options.frozen_every > 1 else ""
        print(f"\nfrozen: {which}the same requests, the initial draft, no trainer", flush=True)
        with Server(target, **serve, env=FROZEN_ENV, log=run / "frozen.log") as server:
            frozen = serve_frozen(server, prompts, shift, len(replies), options.frozen_every)
    report(run, options, live, replies, frozen, shift)


FROZEN_ENV = {"AURORA_SET": "plugin.capture.enabled=false plugin.swap.enabled=false"}


def serve_live(server: Server, prompts: dict, status: Path, seconds: float) -> tuple[Progress, list[Reply], int]:
    """Both stretches of traffic. Returns the progress, all replies, and how many requests came before the shift."""
    progress, replies, shift = Progress(server, status, seconds), [], 0
    for domain, share in (("code", SHIFT_AT), ("prose", 1 - SHIFT_AT)):
        shift = len(replies)
        over = threading.Event()
        timer = threading.Timer(seconds * share, over.set)
        timer.daemon = True
        timer.start()
        for reply in send(server, prompts[domain], until=over, domain=domain):
            replies.append(reply)
            progress.add(reply, domain)
        timer.cancel()
    return progress, replies, shift


def serve_frozen(server: Server, prompts: dict, shift: int, total: int, every: int) -> list[float]:
    progress = Progress(server)
    for domain, count in (("code", shift), ("prose", total - shift)):
        for reply in send(server, prompts[domain][:count:every]):
            progress.add(reply, domain)
    return progress.lengths


def make_prompts(target: Path, count: int) -> dict[str, list[list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    return {domain: text.prompts(domain, count, PROMPT_TOKENS, tokenizer, seed=2) for domain in text.DOMAINS}


def report(run: Path, options: argparse.Namespace, live: Progress, replies: list, frozen: list, shift: int) -> None:
    """Print the summary, write it as JSON, draw the picture."""
    lengths, mean = live.lengths, lambda values: sum(values) / max(1, len(values))
    reached = next((i + 1 for i, m in enumerate(curve.moving_mean(lengths, WINDOW)) if i >= WINDOW and m >= 2.0), None)
    status = json.loads((run / "status.json").read_text())
    summary = {
        "init": options.init,
        "requests": len(lengths),
        "swaps": len(live.swaps),
        "accept_length_first_40": mean(lengths[:WINDOW]),
        "accept_length_requests_260_to_300": mean(lengths[260:300]) if len(lengths) >= 300 else None,
        "requests_until_2.0": reached,
        "accept_length_before_shift": mean(lengths[max(0, shift - WINDOW) : shift]),
        "accept_length_after_shift": mean(lengths[shift : shift + WINDOW]),
        "accept_length_last_40": mean(lengths[-WINDOW:]),
        "accept_length_frozen": mean(frozen) if frozen else None,
        # Of the first 300 outputs together (it falls with their number), and of an output by itself.
        "distinct_4grams_code": make_target.distinct_fraction([r.tokens for r in replies[:shift][:300]]),
        "distinct_4grams_prose": make_target.distinct_fraction([r.tokens for r in replies[shift:][:300]]),
        "distinct_4grams_in_one_output": mean([make_target.distinct_fraction([r.tokens]) for r in replies]),
        "dropped": status["dropped"],
        "lost": status["lost"],
        "optimizer_steps": status["optimizer_step"],
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=1))
    picture = run / "accept_length.png"
    curve.draw(
        picture,
        lengths,
        frozen,
        frozen_every=options.frozen_every,
        swaps=live.swaps,
        domains=[(0, "code"), (shift, "prose")],
        title=f"An untrained draft ({options.init} initialisation) learns while SGLang serves",
        subtitle=f"chain of {NUM_STEPS} draft steps, greedy, 128 tokens a request, 8 at a time; distinct 4-grams of "
        f"300 outputs: code {summary['distinct_4grams_code']:.0%}, prose {summary['distinct_4grams_prose']:.0%}",
        ceiling=NUM_STEPS + 1,
        window=WINDOW,
    )
    print("\nsummary")
    for name, value in summary.items():
        print(f"  {name:36} {value:.3f}" if isinstance(value, float) else f"  {name:36} {value}")
    print(f"  picture: {picture}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--init", choices=("random", "target"), default="random", help="how the untrained draft starts")
    parser.add_argument("--minutes", type=float, default=10.0, help="of live traffic")
    parser.add_argument("--requests", type=int, default=4000, help="prompts of each domain to choose from")
    parser.add_argument("--home", type=Path, default=Path(".cache"), help="where everything is kept")
    parser.add_argument("--quick", action="store_true", help="a target that trains in a minute")
    parser.add_argument(
        "--frozen-every", type=int, default=4, help="the second pass serves 1 in so many requests: it is slow, and flat"
    )
    parser.add_argument("--no-frozen", action="store_true", help="leave out the second pass")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
