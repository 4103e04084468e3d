"""What a draft loses if it sees less of a request than the server's draft does, on a recording.

    python scripts/measure_context.py RECORDING --config FILE [--train 150] [--judge 60] [--keep 24]
    python scripts/measure_context.py RECORDING --config FILE --parts

Two kinds of loss, in accept length (aurora_trainer/learn/accept_length.py), on requests that were
not trained on:

    context     a prefix-cache hit begins a sample without its prompt, a long output is cut into
                parts with `trainer.assemble.context_positions` of context. Two drafts are trained
                on the same requests, one with whole prompts, one without their first `--cut`
                positions, or, with `--parts`, in the parts that the trainer cuts; both are walked
                whole (as the server drafts) and cut (as the gate scores such samples).
    old prefix  draft KV of a cached prefix stays what an older version wrote. The trained draft is
                walked with the keys and values of these positions from itself at EARLIER stages of
                its training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aurora_trainer.config import TrainerFile, load_trainer_config
from aurora_trainer.drafts.batch import pack
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.intake.assemble import Assembler
from aurora_trainer.intake.sample import Sample
from aurora_trainer.learn.accept_length import accept_length, chains, difference, measure
from aurora_trainer.learn.objective import losses
from aurora_trainer.learn.trainer import Training
from aurora_trainer.recordings.recording import CorruptionLog, read_messages

# shares of the training, after which a draft may have written what is cached
EARLIER = (0, 0.05, 0.1, 0.2, 0.3, 0.55, 0.8)
# of generated tokens
POSITIONS = (0, 16, 32, 64, 128, 256, 512, 1024)


def requests(recording: Path, config: TrainerFile, shared: int) -> list[Sample]:
    """Whole requests, in the order of their ends.

    shared: first tokens that all requests have (a chat template's system prompt). Where a cache hit
        took
    just these away, their features are those of the first request that has them.
    """
    assembler = Assembler(config.trainer.assemble.model_copy(update={"part_positions": 1 << 14}))
    samples = []
    for _, message in read_messages(recording, CorruptionLog()):
        samples += assembler.add(message)
    samples = [s for s in samples if s.prompt_len > 1 and bool(s.has_target.any())]
    first = next((s for s in samples if s.start == 0), None)
    return [
        s if s.start == 0 else with_prefix(s, first)
        for s in samples
        if s.start == 0 or first is not None and s.start == shared
    ]


def with_prefix(sample: Sample, first: Sample) -> Sample:
    """The sample with the positions before it, as another request has them."""
    n = sample.start
    nowhere = torch.full((n,), -1)
    return replace(
        sample,
        start=0,
        tokens=torch.cat([first.tokens[:n], sample.tokens]),
        features=torch.cat([first.features[:n], sample.features]),
        position_version=torch.cat([first.position_version[:n], sample.position_version]),
        position_node=torch.cat([nowhere, sample.position_node]),
        node_position=sample.node_position + n,
    )


def in_parts(recording: Path, config: TrainerFile) -> dict[str, list[Sample]]:
    """Each request's samples as the trainer cuts it, by request id."""
    assembler, parts = Assembler(config.trainer.assemble), dict[str, list[Sample]]()
    for _, message in read_messages(recording, CorruptionLog()):
        for sample in assembler.add(message):
            parts.setdefault(sample.request, []).append(sample)
    return parts


def cached(sample: Sample, options: argparse.Namespace) -> int:
    """Positions of the prompt that the prefix cache holds."""
    at_most = sample.prompt_len - 1
    return min(options.cut, at_most) if options.keep is None else max(0, at_most - options.keep)


def without_prefix(sample: Sample, cut: int) -> Sample:
    """The sample as a cache hit of the prompt's first `cut` positions leaves it."""
    return replace(
        sample,
        start=sample.start + cut,
        tokens=sample.tokens[cut:],
        features=sample.features[cut:],
        position_version=sample.position_version[cut:],
        position_node=sample.position_node[cut:],
        node_position=sample.node_position - cut,
    )


def train(
    config: TrainerFile, samples: Sequence[Sample]
) -> tuple[Draft, dict[int, dict[str, Tensor]]]:
    """The draft after `samples`, and its weights after so many of them as EARLIER says."""
    training, earlier = Training(config), {}
    marks = {int(share * len(samples)) for share in EARLIER}
    for number, sample in enumerate(samples):
        if number in marks:
            earlier[number] = training.draft.checkpoint()
        training._keep(sample)
        while training.due():
            training.step()
    training.close()
    return training.draft.requires_grad_(False), earlier


class OldPrefix:
    """A draft whose prompts' keys and values another one wrote. One layer only."""

    def __init__(self, draft: Draft, old: Draft, prompt_positions: Tensor):
        self._draft, self._old, self._prompt = draft, old, prompt_positions

    def __getattr__(self, name: str):
        return getattr(self._draft, name)

    @torch.no_grad()
    def context(self, tokens, features, positions, context_start, rows):
        draft = self._draft
        (new,), (old,) = (
            d.context(tokens, features, positions, context_start)[1] for d in (draft, self._old)
        )
        kv = tuple(torch.where(self._prompt[:, None, None], o, n) for o, n in zip(old, new))
        (layer,) = draft.layers
        state = draft._project(features.to(draft.fc.weight.dtype))[rows]
        x = layer.attention_input(draft._embeds(tokens[rows]), state)
        rope = draft._rope(positions[rows])
        return layer.finish(
            state, draft._attend(layer, x, rope, kv, None, context_start[rows], rows + 1, None)
        ), [kv]


def old_prefix(
    draft: Draft, old: Draft, samples: Sequence[tuple[Sample, int]], config: TrainerFile
) -> np.ndarray:
    """As score.measure, of (sample, its positions from `old`), one at a time."""
    trainer, found = config.trainer, []
    for sample, positions in samples:
        prompt = torch.arange(len(sample.features)) < positions
        mixed = OldPrefix(draft, old, prompt)
        found.append(measure(mixed, [sample], trainer.batch, trainer.loss, "cpu")[0])
    return np.stack(found)


@torch.no_grad()
def by_position(draft: Draft, samples: Sequence[Sample], config: TrainerFile) -> dict[str, float]:
    """Agreement of the first drafted token by the position of its position behind the prompt."""
    trainer, right, all_ = config.trainer, np.zeros(len(POSITIONS)), np.zeros(len(POSITIONS))
    packing = trainer.batch.model_copy(update={"rejected": False})
    for sample in samples:
        batch = pack([sample], packing)
        chain = chains(draft, batch, losses(draft, batch, trainer.loss))
        at = batch.levels[0].parent + 1 - sample.prompt_len
        bucket = np.searchsorted(POSITIONS, at.numpy(), side="right") - 1
        known = chain.known[:, 0].numpy()
        np.add.at(all_, bucket[known], 1)
        np.add.at(right, bucket[known], chain.match[known, 0].numpy())
    return {f"{p}+": round(r / n, 3) for p, r, n in zip(POSITIONS, right, all_) if n >= 50}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("recording", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--train", type=int, default=150, help="requests")
    parser.add_argument("--judge", type=int, default=60, help="requests after those")
    parser.add_argument("--shared", type=int, default=0, help="first tokens that all requests have")
    parser.add_argument(
        "--cut", type=int, default=64, help="first positions of a prompt that are cached"
    )
    parser.add_argument(
        "--keep", type=int, help="or all but the last so many, as in a conversation"
    )
    parser.add_argument(
        "--parts", action="store_true", help="or nothing of prompts; long requests are cut in parts"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as weights:
        own = [f"weights.directory={weights}", "trainer.gate.enabled=false"]
        figures = run(options, load_trainer_config(options.config, own))
    text = json.dumps(figures, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def run(options: argparse.Namespace, config: TrainerFile) -> dict:
    torch.set_num_threads(config.trainer.pace.threads)
    samples = requests(options.recording, config, options.shared)
    taught, judged = samples[: options.train], samples[options.train :][: options.judge]
    if not judged:
        raise ValueError(
            f"{options.recording} has {len(samples)} whole requests; expected more than --train"
            f" {options.train}"
        )
    parts = in_parts(options.recording, config) if options.parts else {}

    def cut(sample: Sample) -> list[Sample]:
        whole = without_prefix(sample, cached(sample, options))
        return parts[sample.request] if options.parts else [whole]

    drafts, trainer = {}, config.trainer
    drafts["whole"], earlier = train(config, taught)
    drafts["cut"], _ = train(config, [part for s in taught for part in cut(s)])

    def walk(draft: Draft, samples: list[list[Sample]]) -> np.ndarray:
        """As score.measure, of requests in one or more samples each."""
        each = [measure(draft, of, trainer.batch, trainer.loss, "cpu").sum(0) for of in samples]
        return np.stack(each)

    walked = {
        f"trained on {name}, walked with {context}": walk(draft, of)
        for name, draft in drafts.items()
        for context, of in (
            ("whole", [[s] for s in judged]),
            ("cut", [cut(s) for s in judged]),
        )
    }
    whole, writers = drafts["whole"], {}
    for number, weights in () if options.parts else earlier.items():
        old = Draft.load(trainer.model.draft, whole.embed.float())
        old.load_checkpoint({n: t for n, t in weights.items() if n not in ("d2t", "t2d")})
        old.compute_in("cpu", whole.fc.weight.dtype).requires_grad_(False)
        walked[f"trained on whole, prefix' KV after {number} requests"] = old_prefix(
            whole, old, [(s, cached(s, options)) for s in judged], config
        )
        scores = measure(old, judged, trainer.batch, trainer.loss, "cpu")
        writers[f"after {number} requests"] = round(accept_length(scores), 4)
    base = walked["trained on whole, walked with whole"]
    return {
        "requests": {"trained": len(taught), "judged": len(judged)},
        "parts_mean": float(np.mean([len(cut(s)) for s in judged])),
        "cached_mean": float(np.mean([cached(s, options) for s in judged])),
        "prompt_tokens_mean": float(np.mean([s.prompt_len for s in judged])),
        "generated_mean": float(np.mean([len(s.tokens) - s.prompt_len for s in judged])),
        "accept_length": {name: round(accept_length(scores), 4) for name, scores in walked.items()},
        "accept_length_of_writers": writers,
        "minus_the_first_and_its_standard_error": {
            name: [round(x, 4) for x in difference(scores, base)]
            for name, scores in walked.items()
            if scores is not base
        },
        "first_token_agreement_by_position": {
            name: by_position(d, judged, config) for name, d in drafts.items()
        },
    }


if __name__ == "__main__":
    main()
