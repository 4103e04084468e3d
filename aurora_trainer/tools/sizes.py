"""How large things are: messages, samples, files, and what a training step keeps, each from its
shapes.

Each function is one formula, with where its terms come from; tests/trainer/tools/test_sizes.py
holds them against the wire encoder, staged snapshots, a published version, a checkpoint, and what
autograd keeps in a real training step.

H hidden, F feature width, V target vocabulary, VD draft vocabulary, N tree nodes, P = S + 1 (S
draft steps), K kept target logits, B requests in a step, P# parameters. What follows from the
draft's own layers is in its kind's file (drafts/kinds.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aurora_sglang_plugin.link import wire
from aurora_trainer.config import TrainerConfig
from aurora_trainer.drafts.kinds import (
    DraftConfig,
    activation_bytes,
    parameter_count,
    row_parameters,
)
from aurora_trainer.drafts.target import Target

# of aurora_kernels.tree_loss_ref: logits alive at a time
CHUNK_LOGITS = 1 << 21
# bytes of a float32 master, of AdamW's two moments, of an int64
MASTER, MOMENTS, COUNTER = 4, 8, 8


@dataclass(frozen=True)
class Load:
    """What a server does, all of it together."""

    # generated
    tokens_per_s: float = 1000.0
    requests_per_s: float = 4.0
    # of a request
    prompt_tokens: int = 512
    # tokens that a verify step commits, bonus included
    accept_length: float = 2.5
    # requests in a step
    running: int = 16
    num_steps: int = 3
    topk: int = 1
    # nodes of a tree; 0: num_steps + 1, what topk 1 has
    draft_tokens: int = 0
    # tensor-parallel ranks
    tp: int = 1
    # that one trainer learns from
    servers: int = 1
    # of the trainer, a device each
    ranks: int = 1

    @property
    def nodes(self) -> int:
        return self.draft_tokens or 1 + self.num_steps * self.topk


def features_bytes(draft: DraftConfig, size: int, features: str = "model") -> int:
    """One row of features on its way: F of the server's dtype, or a byte each and a scale a layer
    (float32), as plugin.capture.features says."""
    return (
        draft.feature_size + 4 * draft.num_aux
        if features == "float8"
        else (draft.feature_size * size)
    )


def verify_bytes(
    draft: DraftConfig, load: Load, size: int, kept: int, features: str = "model"
) -> float:
    """One verify message of B requests, as wire.FRAMES and wire.encode have it.

    B rows of int32: positions 1, draft_tokens N, parents N, accept_path P, feature_lens 1,
    next_tokens P; topk_ids and topk_logits (float32) N K each, logsumexp N. Features for each of
    B * accept_length rows. The header: what msgpack makes of one with as many requests of
    32-character ids.
    """
    n, p, k = load.nodes, load.num_steps + 1, min(kept, draft.vocab_size)
    row = 4 * (2 + 3 * n + 2 * p) + 8 * n * k
    rows = load.accept_length * features_bytes(draft, size, features)
    return load.running * (row + rows) + header_bytes("verify", load, k)


def queued_row_bytes(
    draft: DraftConfig, load: Load, size: int, kept: int, features: str = "model"
) -> int:
    """One request's verify step while it waits in the publisher's queue on CUDA, as step_buffer.py
    packs it.

    Room for features of all P rows. topk_ids (int32) and topk_logits (float32, as SGLang's) N K
    each, logsumexp N; int32: draft_tokens and a tree's two links N each, path and next_tokens P
    each, position and length. On the CPU the raw logits (V a node) wait instead of the kept ones.
    """
    n, p = load.nodes, load.num_steps + 1
    kept = min(kept, draft.vocab_size)
    ids = 1 if load.topk == 1 else 3
    rows = p * features_bytes(draft, size, features)
    return rows + n * kept * 8 + 4 * (n * (1 + ids) + 2 * p + 2)


def prefill_bytes(draft: DraftConfig, tokens: int, size: int, features: str = "model") -> float:
    """One request's chunk of a prefill message: five int32, and for each token its id and F
    features. Plus a header, though several requests may share one."""
    row = 4 + features_bytes(draft, size, features)
    return 20 + tokens * row + header_bytes("prefill", Load(running=1), 0)


def header_bytes(kind: wire.Kind, load: Load, kept: int) -> int:
    """Part 0 of a message, encoded with empty arrays under the names and ids of a real one."""
    b = load.running
    shapes = {"B": 0, "N": load.nodes, "P": load.num_steps + 1, "K": kept, "T": 0, "F": 0, "C": 0}
    arrays = {
        name: (dtypes[-1], np.empty([shapes[letter] for letter in shape], wire.DTYPES[dtypes[-1]]))
        for name, (dtypes, shape) in wire.FRAMES[kind].items()
    }
    large = 1 << 31
    header = wire.Header(
        schema=wire.SCHEMA_VERSION, kind=kind, session="e" * 32, captured_seq=large, sent_seq=large,
        heartbeats=large,
        dropped={"queue_full": large}, queued=0, target="t" * 32, draft_version=1 << 16,
        extend_version=1 << 16,
        time_ns=1 << 61, requests=["r" * 32] * b, flags=[0] * b if kind == "verify" else [],
        num_steps=load.num_steps, topk=load.topk,
    )  # fmt: skip
    return len(wire.encode(header, arrays)[0])


def sample_bytes(draft: DraftConfig, load: Load, size: int, kept: int) -> float:
    """One generated position in the trainer's memory, as sample.Sample holds it.

    Position: F features in the server's dtype, a token and a node (int64), a version (int32). A
        position has N / accept_length
    nodes: token, parent, depth, position (int64), two bools, K ids (int64) and logits (float32), a
        log-sum-exp; a tree has
    its first node (int64) and a version (int32).
    """
    node = 4 * COUNTER + 2 + min(kept, draft.vocab_size) * 12 + 4
    tree = load.nodes * node + COUNTER + 4
    return draft.feature_size * size + 2 * COUNTER + 4 + tree / load.accept_length


def checkpoint_bytes(
    draft: DraftConfig, target: Target, compute: int, average: bool = False
) -> int:
    """state.safetensors: the draft as it computes, masters and AdamW's moments
    (optimizer.Optimizer.state_dict), and the running mean.

    The host holds as much: the memory of the last snapshot (training_state.copied).
    """
    return parameter_count(draft, target) * (compute + MASTER + MOMENTS + MASTER * average)


def trainer_device_bytes(
    draft: DraftConfig, target: Target, trainer: TrainerConfig, compute: int, load: Load
) -> dict[str, int]:
    """What is on the trainer's device at the peak of a step, for c bytes of the dtype that it
    computes in; with R ranks on that of rank 0, which holds most.

    weights     c P#, and 4 P#/R of float32 masters if c < 4 (otherwise the weights are the
                masters)
    moments     8 P#/R (AdamW)
    average     4 P#/R of the running mean, if it is on, and c P# of the draft that it is scored in
    gradients   c P#, and 4 P# for their float32 copies if c < 4 (Optimizer.step); with several
                ranks 8 P#/R of float32 whatever c is (Shards.summed)
    served      2 c P#: the frozen copies that the gate scores, of the served and of the initial
                weights (served.Served; one and the same until the first version)
    embedding   c V H, shared by both
    loss        the head's gradient in float32, twice (tree_loss keeps it, then scales it); a chunk
                of logits, twice
    features    those of the buffer's samples at most, shared by the ranks; none are kept on the CPU
    activations rows of `activation_bytes`, for a rank's share of a batch of batch.max_positions
    positions that all have a target
    """
    count, c = parameter_count(draft, target), compute
    head = 4 * draft.draft_vocab_size * draft.hidden_size
    depth = trainer.batch.depth or load.num_steps
    kept = trainer.buffer.max_bytes // load.ranks if trainer.model.device == "cuda" else 0
    rows, own = -(-trainer.batch.max_positions // load.ranks), -(-count // load.ranks)
    summed = 8 * own if load.ranks > 1 else 4 * count * (c < 4)
    return {
        "weights_bytes": count * c + own * (MASTER if c < 4 else 0),
        "moments_bytes": own * MOMENTS,
        "average_bytes": own * MASTER + count * c if trainer.optimizer.average else 0,
        "gradients_bytes": count * c + summed,
        "served_bytes": 2 * count * c,
        "embedding_bytes": c * draft.vocab_size * (draft.target_hidden_size or draft.hidden_size),
        "loss_bytes": 2 * head + 2 * 4 * max(32 * draft.draft_vocab_size, CHUNK_LOGITS),
        "features_bytes": kept,
        "activations_bytes": activation_bytes(draft, rows, rows, depth, c),
    }


def step_flops(draft: DraftConfig, trainer: TrainerConfig, load: Load) -> float:
    """One optimizer step's, without attention's scores: 6 for each parameter and row that it
    multiplies (forward 2, backward 4). The gate's forward passes come on top, at each
    publication.
    """
    row = row_parameters(draft, trainer.batch.depth or load.num_steps)
    return float(trainer.batch.max_positions * row * 6)


def ranks_bytes(draft: DraftConfig, target: Target, compute: int) -> int:
    """What an update moves between the ranks for each parameter: its gradient in float32 to whoever
    updates it, and the new value in the dtype that they compute in to all (Shards).
    """
    return parameter_count(draft, target) * (4 + compute)


def largest_draft(device: dict[str, int], parameters: int, device_bytes: float) -> int:
    """Parameters of a draft of this shape that a device of so many bytes would hold: what grows
    with them (`trainer_device_bytes`) in what the rest leaves."""
    fixed = "embedding_bytes", "loss_bytes", "features_bytes", "activations_bytes"
    rest = sum(device[name] for name in fixed)
    return int(max(0.0, device_bytes - rest) * parameters / (sum(device.values()) - rest))
