"""Tokens a second from socket to optimizer: synthetic verify messages of a wide target over a real
socket into the trainer's own loop, where only the device is missing.

    python scripts/bench_trainer.py [--hidden 4096] [--steps 12] [--rounds 3] [--out FILE.json]

A process of its own sends (ZeroMQ, ipc); the Daemon receives, checks, assembles, buffers, draws and
packs. What a GPU would do is a wait as long as its arithmetic takes (`plan`'s FLOP of a step over
--tflops), and what is sent to it goes to torch's `meta` device after the host's part of it. In
turns: features packed and sent with every batch, and sent once (kept_features.py).

`tokens_per_s` is by the processor time of the loop's thread plus the device's, as on a machine
where nothing else runs; `wall_tokens_per_s` is what this one did.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MethodType

import numpy as np
import torch
import zmq
from safetensors.torch import save_file

from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_trainer.config import load_trainer_config
from aurora_trainer.daemon import Daemon
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_init import randomise
from aurora_trainer.drafts.kept_features import KeptFeatures
from aurora_trainer.learn.learner import Learned
from aurora_trainer.learn.objective import Score
from aurora_trainer.learn.optimizer import Update
from aurora_trainer.tools.sizes import Load, step_flops

# draft steps, requests of a message, prompt and output tokens of a request
S, ROWS, PROMPT, OUTPUT = 3, 16, 64, 192
VOCAB, KEPT = 1024, 64
# that are not counted
WARM_STEPS = 3
# generated before the first step, more than a batch
AHEAD_TOKENS = 8192
# of the draft whose arithmetic the device does
DEVICE = dict(intermediate_size=12288, draft_vocab_size=32768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tflops", type=float, default=450.0, help="that the device reaches")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict]] = {"sent with every batch": [], "sent once": []}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        make_models(home, options.hidden)
        for number in range(options.rounds):
            for how, turns in found.items():
                site = home / f"{number}-{len(turns)}-{how.replace(' ', '-')}"
                turns.append(turn(home, site, options, keep=how == "sent once"))
                print(how, json.dumps(turns[-1]), file=sys.stderr)
    medians = {
        how: {key: round(statistics.median(t[key] for t in turns), 4) for key in turns[0]}
        for how, turns in found.items()
    }
    before, after = (medians[how]["tokens_per_s"] for how in found)
    host = [medians[how]["host_ms_per_step"] for how in found]
    result = {
        "hidden": options.hidden, "torch": torch.__version__, "device_tflops": options.tflops,
        **medians,
        "tokens_ratio": round(after / before, 2), "host_ratio": round(host[0] / host[1], 2),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def make_models(home: Path, hidden: int) -> None:
    """A target that is only read for its embedding, and a draft as wide, small elsewhere."""
    (home / "target").mkdir()
    about = dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=hidden,
        intermediate_size=64, num_hidden_layers=36, num_attention_heads=2, num_key_value_heads=2,
        head_dim=64, vocab_size=VOCAB, max_position_embeddings=4096, rms_norm_eps=1e-6,
        rope_theta=10000.0, eos_token_id=VOCAB - 1, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    (home / "target" / "config.json").write_text(json.dumps(about))
    embed = torch.randn(VOCAB, hidden).bfloat16()
    tensors = {"model.embed_tokens.weight": embed, "lm_head.weight": embed.clone()}
    save_file(tensors, home / "target" / "model.safetensors", metadata={"format": "pt"})
    config = DraftConfig(
        hidden_size=hidden, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2,
        head_dim=64, vocab_size=VOCAB, draft_vocab_size=VOCAB, aux_layer_ids=(1, 17, 32),
        max_position_embeddings=4096,
    )  # fmt: skip
    draft = Draft(config, embed.float())
    randomise(draft, 1)
    draft.save(home / "draft")


def turn(home: Path, site: Path, options: argparse.Namespace, keep: bool) -> dict[str, float]:
    site.mkdir()
    settings = {
        "link.endpoint": f"ipc://{site}/link", "weights.directory": site / "weights",
        "trainer.model.target": home / "target", "trainer.model.draft": home / "draft",
        "trainer.checkpoint.directory": site / "checkpoints", "trainer.checkpoint.every_s": 0,
        "trainer.publish.every_s": 0, "trainer.gate.enabled": "false", "trainer.pace.nice": 0,
        "trainer.batch.depth": S,
    }  # fmt: skip
    config = load_trainer_config(None, [f"{key}={value}" for key, value in settings.items()])
    daemon = Daemon(config)
    learner, pace = daemon.training.learner, config.trainer.pace
    shape = replace(learner.draft.config, **DEVICE)
    device_s = step_flops(shape, config.trainer, Load(num_steps=S)) / (options.tflops * 1e12)
    learner.features = KeptFeatures("meta")
    # by the loop's thread: when each step began, the processor time until then, and its packing
    began: list[tuple[float, float]] = []
    packing_s: list[float] = []

    def learn(self, shares) -> Learned:
        """Learner.learn without a device: pack and send, then wait as long as it would compute."""
        began.append((time.monotonic(), time.thread_time()))
        steps.value += 1
        batch = self._packed(shares[0])
        counts = batch.counts()
        packing_s.append(time.thread_time() - began[-1][1])
        if not keep:
            self.features.clear()
        time.sleep(device_s)
        self.optimizer.updates += 1
        return Learned(Update(True, 1.0, 0.0, 1.0), Score(*[counts] * 4), None, None)

    if not keep:
        learner.features.of = lambda samples: None
    learner.learn = MethodType(learn, learner)
    # training begins when there is a batch, as it goes on later
    training, due = daemon.training, daemon.training.due

    def due_with_a_batch() -> bool:
        if not began and training.buffer.positions <= config.trainer.batch.max_positions:
            training._pending_tokens = 0
        return due()

    training.due = due_with_a_batch
    context = multiprocessing.get_context("spawn")
    steps = context.Value("q", 0)
    target = target_fingerprint(home / "target")
    about = (settings["link.endpoint"], target, options.hidden, pace.new_positions_per_step, steps)
    server = context.Process(target=serve, args=about, daemon=True)
    server.start()
    daemon.run_live(options.steps + WARM_STEPS + 1)
    server.kill()
    server.join()
    wall_s, host_s = (
        (end - start) / options.steps for end, start in zip(began[-1], began[WARM_STEPS])
    )
    tokens = pace.new_positions_per_step
    return {
        "tokens_per_s": tokens / (host_s + device_s),
        "wall_tokens_per_s": tokens / wall_s,
        "host_ms_per_step": 1e3 * host_s,
        "packing_ms_per_step": 1e3 * statistics.mean(packing_s[WARM_STEPS:-1]),
        "device_ms_per_step": 1e3 * device_s,
    }


def serve(endpoint: str, target: str, hidden: int, per_step: int, steps) -> None:
    """As much as the trainer answers: what it could not would be assembled and then evicted."""
    socket = zmq.Context().socket(zmq.PUSH)
    socket.sndhwm = 4
    socket.connect(endpoint)
    tokens = 0
    for parts, count in messages(target, hidden):
        while tokens > AHEAD_TOKENS + steps.value * per_step:
            time.sleep(0.001)
        socket.send_multipart(parts, copy=False)
        tokens += count


def messages(target: str, hidden: int) -> Iterator[tuple[list, int]]:
    """Parts of a message, and generated tokens in it: ROWS requests at a time, without end, chains
    of S of which 2.8 tokens a step are kept."""
    rng, sent = np.random.default_rng(0), 0
    rows, steps = np.arange(ROWS), np.arange(S + 1)
    table = rng.standard_normal((ROWS * max(S + 1, PROMPT), 3 * hidden), np.float32)
    features = (table.view(np.uint32) >> 16).astype(np.uint16)
    logits = np.tile(np.linspace(8, -8, KEPT, dtype=np.float32), (ROWS, S + 1, 1))
    top_ids = np.tile(np.arange(KEPT), (ROWS, S + 1, 1))
    whole = np.full((ROWS, S + 1), np.log(np.exp(logits[0, 0]).sum()) + 0.1, np.float32)

    def message(kind: str, ids: list[str], arrays: dict, **fields) -> list:
        nonlocal sent
        sent += 1
        header = wire.Header(
            schema=wire.SCHEMA_VERSION, kind=kind, session="bench", captured_seq=sent,
            sent_seq=sent, heartbeats=0, dropped={}, queued=0, target=target, draft_version=0,
            extend_version=0, time_ns=time.time_ns(), requests=ids, **fields,
        )  # fmt: skip
        return wire.encode(header, arrays)

    number = 0
    while True:
        ids = [f"request-{number}-{row}" for row in rows]
        number += 1
        prompt = np.full(ROWS, PROMPT)
        yield message("prefill", ids, {
            "positions": int32(prompt * 0), "extend_lens": int32(prompt),
            "feature_lens": int32(prompt), "prompt_lens": int32(prompt),
            "input_ids": int32(np.ones(ROWS * PROMPT)), "next_tokens": int32(np.ones(ROWS)),
            "aux_hidden_states": ("bfloat16", features[: ROWS * PROMPT]),
        }), 0  # fmt: skip
        root = prompt
        while root.min() < PROMPT + OUTPUT:
            accepted = rng.choice((0, 1, 2, 3, 3), ROWS)
            kept = steps <= accepted[:, None]
            yield message("verify", ids, {
                "positions": int32(root), "draft_tokens": int32(np.ones((ROWS, S + 1))),
                "parents": int32(np.tile(steps - 1, (ROWS, 1))),
                "accept_path": int32(np.where(kept, steps, -1)),
                "feature_lens": int32(accepted + 1), "next_tokens": int32(np.ones(kept.shape)),
                "aux_hidden_states": ("bfloat16", features[: int(kept.sum())]),
                "topk_ids": int32(top_ids), "topk_logits": ("float32", logits),
                "logsumexp": ("float32", whole),
            }, num_steps=S, topk=1, flags=[0] * ROWS), int(kept.sum())  # fmt: skip
            root = root + accepted + 1
        yield message("end", ids, {"committed_lens": int32(root)}, reasons=["length"] * ROWS), 0


def int32(values) -> tuple[str, np.ndarray]:
    return "int32", np.ascontiguousarray(values, np.int32)


if __name__ == "__main__":
    main()
