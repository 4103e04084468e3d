"""Evaluate drafts on a recording: what a server's accept length would have been, had it drafted
with them.

    accept length        as accept_length.py defines it: tokens per step of a walk along the
                         committed tokens
    as chains            the same with chains of 1, 2, ... draft steps, whatever the server drew
    rejection sampling   1 + sum_d prod_{j<=d} sum min(p, q), at every position along the committed
                         tokens, p the raw target at temperature 1: what a verifier would accept
                         that has drafts drawn from q. An upper bound, because all tokens beyond the
                         target's kept ones count as one (loose for a draft that is untrained); and
                         for more than one draft step an estimate.
    live                 what the server's own steps accepted with the drafts that served

Only steps are counted whose chain is known to its end, live ones too: a request's last steps run
past what was committed. Intervals are bootstraps over requests, because samples of one request are
alike.

Dimensions: S draft steps, R level-0 positions of a batch, n requests, D drafts.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from aurora_sglang_plugin.weights.manifest import current_version, target_fingerprint, version_name
from aurora_trainer.drafts.batch import BatchConfig, group, pack
from aurora_trainer.drafts.kinds import Draft, load
from aurora_trainer.drafts.target import TargetTensors, open_target
from aurora_trainer.intake.assemble import AssembleConfig, Assembler
from aurora_trainer.intake.sample import Sample
from aurora_trainer.learn.accept_length import (
    WALK,
    chains,
    live,
    sampling,
    tree_shape,
    walked,
    walks,
)
from aurora_trainer.learn.objective import LossConfig, losses
from aurora_trainer.recordings.recording import CorruptionLog, read_messages
from aurora_trainer.recordings.replay import on_one_clock

log = logging.getLogger(__name__)

NO_DOMAIN = "(none)"
# requests are walked whole up to here
PART_POSITIONS = 1 << 14
PROGRESS_S = 5.0


@dataclass
class Request:
    """Sums of one request, float64: `served` [D, 2] (steps, tokens) of the walk with what the
    server would have drawn; `chains` [D, len(WALK), S]; `sampling` [D, 2] (positions, sum)."""

    domain: str
    served: np.ndarray
    chains: np.ndarray
    sampling: np.ndarray
    # steps, tokens
    live: np.ndarray = field(default_factory=lambda: np.zeros(2))


@dataclass
class Evaluation:
    """What was computed, one entry per request; `report` makes figures of it
    (evaluation_report.py).
    """

    recording: Path
    drafts: list[str]
    target: str
    depth: int
    # (num_steps, topk, nodes) of the recorded trees
    shape: tuple[int, int, int] = (0, 0, 0)
    # that drew them
    versions: set[int] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)
    # evaluated, and left out by cause
    samples: Counter[str] = field(default_factory=Counter)
    damaged_records: int = 0


def evaluate(
    drafts: Sequence[Path],
    recording: Path,
    target: str,
    *,
    depth: int = 0,
    device: str = "cpu",
    max_requests: int = 0,
) -> Evaluation:
    """Walk every draft (its directory, or a weights directory: the version to serve) along a
    recording of `target`.

    depth: draft steps of chains, 0 for as many as were recorded. Raises ValueError for drafts or
        recordings that do not
    fit.
    """
    files = open_target(target)
    tensors = TargetTensors(files, device, torch.float32)
    directories = [_directory(path) for path in drafts]
    loaded = [load(path, tensors).to(device).eval() for path in directories]
    fingerprint = target_fingerprint(target)
    result = Evaluation(Path(recording), _names(directories), fingerprint, depth)
    assembler = Assembler(
        AssembleConfig(part_positions=PART_POSITIONS, eos_token_ids=files.eos_token_ids)
    )
    requests: dict[tuple[str, str], Request] = {}
    domains: dict[tuple[str, str], str] = {}
    held: list[Sample] = []
    damage, now_s, said = CorruptionLog(), 0.0, time.monotonic()

    def take(samples: list[Sample], flush: bool = False) -> None:
        for sample in samples:
            result.shape = result.shape if any(result.shape) else tree_shape(sample)
            result.depth = result.depth or sample.num_steps
            if result.shape[1] > 1 and result.depth < result.shape[0]:
                raise ValueError(
                    f"depth {depth}: the recording has trees of {result.shape[0]} steps; expected"
                    " no less"
                )
            if _usable(sample, loaded, result):
                held.append(sample)
        while held and (flush or sum(len(s.features) for s in held) >= BatchConfig().max_positions):
            some = next(group(held, BatchConfig()))
            del held[: len(some)]
            _evaluate(some, loaded, device, result, requests)

    for _, message in on_one_clock(read_messages(recording, damage)):
        header = message.header
        if header.target != fingerprint:
            result.samples["messages_of_another_target"] += 1
            continue
        for request, domain in zip(header.requests, header.domains):
            if domain:
                domains[header.session, request] = domain
        now_s = max(now_s, header.time_ns / 1e9)
        take(assembler.add(message) + assembler.idle(now_s))
        if max_requests and len(requests) >= max_requests:
            break
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            log.info("evaluating requests=%d", len(requests))
    take(assembler.idle(float("inf")), flush=True)
    for key, found in requests.items():
        found.domain = domains.get(key, NO_DOMAIN)
    result.requests = list(requests.values())[: max_requests or None]
    result.damaged_records = damage.count
    if not result.requests:
        raise ValueError(
            f"recording {recording} has no request to evaluate on, left out:"
            f" {dict(result.samples) or 'nothing'}; expected traffic of target {fingerprint}"
            f" (--target {target}) with trees"
        )
    return result


@torch.no_grad()
def _evaluate(
    samples: list[Sample],
    drafts: list[Draft],
    device: str,
    result: Evaluation,
    requests: dict[tuple, Request],
) -> None:
    batch = pack(samples, BatchConfig(depth=result.depth, rejected=False))
    on_device = batch.to(device)
    results = [losses(draft, on_device, LossConfig()) for draft in drafts]
    found = [chains(draft, on_device, of) for draft, of in zip(drafts, results)]
    served = [
        walked(draft, on_device, samples, of, result.depth) for draft, of in zip(drafts, found)
    ]
    roots, owner = batch.base_is_root, batch.base_sample
    for n, sample in enumerate(samples):
        mine = (owner == n).nonzero()[:, 0]
        known = found[0].known[mine]
        key = (sample.session, sample.request)
        if key not in requests:
            empty = np.zeros((len(drafts), len(WALK), result.depth))
            requests[key] = Request(
                NO_DOMAIN, np.zeros((len(drafts), 2)), empty, np.zeros((len(drafts), 2))
            )
        request = requests[key]
        is_root = roots[mine]
        for d, chain in enumerate(found):
            request.served[d] += served[d][n]
            request.chains[d] += walks(chain.match[mine], chain.overlap[mine], known, is_root)
            request.sampling[d] += sampling(chain.overlap[mine], known)
        request.live += live(
            sample,
            batch.levels[0].parent[mine] - _first_position(samples, n),
            is_root & known.all(1),
        )
        result.samples["evaluated"] += 1
        result.versions.update(sample.tree_version.unique().tolist())


def _usable(sample: Sample, drafts: list[Draft], result: Evaluation) -> bool:
    cause = None
    if any(sample.features.shape[1] != draft.config.feature_size for draft in drafts):
        cause = "wrong_feature_width"
    elif any(
        int(t.max()) >= drafts[0].config.vocab_size
        for t in (sample.tokens, sample.node_token, sample.topk_ids)
    ):
        cause = "token_out_of_vocabulary"
    elif sample.num_steps < 1 or not bool((sample.position_node >= 0).any()):
        cause = "without_trees"
    elif bool(sample.node_altered.all()):
        cause = "altered_distribution"
    elif tree_shape(sample)[1:] != result.shape[1:] or (
        result.shape[1] > 1 and tree_shape(sample) != result.shape
    ):
        cause = "another_tree_shape"
    if cause:
        result.samples[cause] += 1
    elif sample.start > 0:
        # evaluated, but with less context than the server had
        result.samples["without_whole_prompt"] += 1
    return cause is None


def _first_position(samples: list[Sample], n: int) -> int:
    return sum(len(s.features) for s in samples[:n])


def _directory(path: Path) -> Path:
    """The directory of a draft; of a weights directory, the version that servers serve."""
    version = current_version(path) if Path(path).is_dir() else None
    return Path(path) / version_name(version) if version is not None else Path(path)


def _names(drafts: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    paths = [Path(path).resolve() for path in drafts]
    if len(set(paths)) < len(paths):
        raise ValueError("a draft is given twice; expected different ones")
    for parts in range(1, max(len(p.parts) for p in paths)):
        names = ["/".join(p.parts[-parts:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    return [str(p) for p in paths]
