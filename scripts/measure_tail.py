"""What one bucket for the target's tail costs: top-K targets against exact ones, per K and
distance, on real text.

    python scripts/measure_tail.py TARGET DRAFT [DRAFT ...] --out FILE

TARGET and DRAFT are directories as the demo makes them (.cache/target,
.cache/demo-*/weights/vNNNNNN). The target reads held-out prompts (`text`), and greedy continuations
of others (`greedy`: what a server that decodes greedily sees); the draft drafts one token from
every position. Written per draft, traffic, distance and K, over all positions:

- loss_error: mean loss / mean exact loss - 1
- gradient_cosine, gradient_error: cosine of d(mean loss)/d(logits), all positions one vector, and
  |g_K
  - g| / |g|
- acceptance_error: mean acceptance - mean exact acceptance; tail: mean mass beyond the K largest
  (of no distance)

and the same at K = 32 over positions whose tail holds less than 1 %, 1 to 3 %, and so on: other
targets have other tails.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from itertools import pairwise
from pathlib import Path

import text
import torch
import transformers
from aurora_kernels.topk_logprobs import topk_logprobs_ref
from aurora_kernels.tree_loss_ref import (
    DISTANCES,
    draft_ids_of,
    exact_distance_,
    shares_of,
    topk_distance_,
)
from measure_target import greedy
from transformers import AutoModelForCausalLM, AutoTokenizer

from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.vocab import target_ids

KEPT = (1, 2, 4, 8, 16, 32, 64, 128)
TAILS = (0, 0.01, 0.03, 0.1, 0.3, 1)


@torch.no_grad()
def positions(
    model, draft: Draft, rows: list[list[int]], begin: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(draft logits [R, VD], target logits [R, V]) of every position that holds a token at position
    `begin` or later.
    """
    # hidden_states[0] enters the first layer
    layers = [1 + i for i in draft.config.aux_layer_ids]
    z, t = [], []
    for row in rows:
        out = model(torch.tensor([row]), output_hidden_states=True)
        features = torch.cat([out.hidden_states[n][0] for n in layers], -1)[:-1]
        positions = torch.arange(len(features))
        state, _ = draft.context(
            torch.tensor(row[1:]), features, positions, torch.zeros_like(positions)
        )
        z.append(draft.logits(state)[begin - 1 :])
        t.append(out.logits[0, begin:].float())
    return torch.cat(z), torch.cat(t)


def exact(
    z: torch.Tensor, t: torch.Tensor, distance: str, ids: torch.Tensor
) -> tuple[float, torch.Tensor, float]:
    """(mean loss, its gradient d / dz, mean acceptance); z is not changed."""
    dz, weight = z.clone(), z.new_full((len(z),), 1 / len(z))
    target = t.clone(), ids, draft_ids_of(ids, t.shape[1])
    _, loss, acceptance, _ = exact_distance_(dz, *target, weight, shares_of(distance), True)
    return float(loss.mean()), dz, float(acceptance.mean())


def bucketed(z, t, distance: str, ids: torch.Tensor, k: int) -> tuple[float, torch.Tensor, float]:
    """The same from the target's K largest logits."""
    dz, weight = z.clone(), z.new_full((len(z),), 1 / len(z))
    top, logits, lse = topk_logprobs_ref(t, k)
    target = draft_ids_of(ids, t.shape[1])[top.long()], logits, lse
    _, loss, acceptance, _ = topk_distance_(dz, *target, weight, shares_of(distance), True)
    return float(loss.mean()), dz, float(acceptance.mean())


def errors(z: torch.Tensor, t: torch.Tensor, ids: torch.Tensor, ks: tuple[int, ...] = KEPT) -> dict:
    out = {"positions": len(z), "distances": {}}
    for distance in DISTANCES:
        loss, g, acceptance = exact(z, t, distance, ids)
        out["acceptance"] = acceptance
        rows = out["distances"][distance] = {"loss": loss, "kept": {}}
        for k in ks:
            k_loss, k_g, k_acceptance = bucketed(z, t, distance, ids, k)
            rows["kept"][k] = {
                "loss_error": k_loss / loss - 1,
                "gradient_cosine": float(
                    torch.cosine_similarity(k_g.flatten().double(), g.flatten().double(), 0)
                ),
                "gradient_error": float((k_g - g).norm() / g.norm()),
            }
            out.setdefault("acceptance_error", {})[k] = k_acceptance - acceptance
    p = t.softmax(-1).sort(-1, descending=True).values
    out["tail"] = {k: float(p[:, k:].sum(-1).mean()) for k in ks}
    return out


def by_tail(z: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> dict:
    tail, out = 1 - t.softmax(-1).topk(32).values.sum(-1), {}
    for low, high in pairwise(TAILS):
        rows = (tail >= low) & (tail < high)
        if rows.any():
            out[f"{low} to {high}"] = errors(z[rows], t[rows], ids, (32,))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("drafts", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--prompts", type=int, default=16, help="of each domain and traffic, 256 tokens each"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    # rows, first position that counts
    traffic = {"text": ([], 1), "greedy": ([], 128)}
    for domain in text.DOMAINS:
        traffic["text"][0].extend(text.prompts(domain, args.prompts, 256, tokenizer, seed=0))
        prompts = text.prompts(domain, args.prompts, 128, tokenizer, seed=1)
        traffic["greedy"][0].extend(
            p + g for p, g in zip(prompts, greedy(args.target, prompts, 128), strict=True)
        )
    results = {}
    for path in args.drafts:
        draft = Draft.load(path, model.get_input_embeddings().weight)
        for name, (rows, begin) in traffic.items():
            z, t = positions(model, draft, rows, begin)
            ids = target_ids(draft.d2t)
            results[f"{path.name} {name}"] = errors(z, t, ids) | {
                "by_tail_at_32": by_tail(z, t, ids)
            }
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "target": json.loads((args.target / "target.json").read_text()),
        "vocab_size": model.config.vocab_size,
        "results": results,
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for name, result in results.items():
        show(name, result, KEPT)
        for tail, part in result["by_tail_at_32"].items():
            show(f"{name}, tail {tail}", part, (32,))


def show(name: str, result: dict, ks: tuple[int, ...]) -> None:
    print(
        f"\n{name}: {result['positions']} positions, acceptance {result['acceptance']:.3f};"
        " columns: loss, cosine, gradient"
    )
    print(f"{'K':>4} {'tail':>8} {'accept.':>8}" + "".join(f"{d:>28}" for d in DISTANCES))
    for k in ks:
        line = f"{k:>4} {result['tail'][k]:8.4f} {result['acceptance_error'][k]:8.4f}"
        for d in DISTANCES:
            e = result["distances"][d]["kept"][k]
            line += f"{e['loss_error']:10.4f}{e['gradient_cosine']:9.4f}{e['gradient_error']:9.4f}"
        print(line)


if __name__ == "__main__":
    main()
