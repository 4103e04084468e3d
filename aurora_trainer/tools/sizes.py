"""How large things are: messages, samples, files, and what a training step keeps, each from its
shapes.

Each function is one formula, with where its terms come from; tests/trainer/tools/test_sizes.py
holds them against the wire encoder, staged snapshots, a published version, a checkpoint, and what
autograd keeps in a real training step.

H hidden, F = A H feature width (A aux layers), V target vocabulary, VD draft vocabulary, Hq and Hkv
heads of D, I of the MLP, N tree nodes, P = S + 1 (S draft steps), K kept target logits, B requests
in a step, P# parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from aurora_sglang_plugin.drafts.eagle3_check import expected_shapes
from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_sglang_plugin.link import wire
from aurora_trainer.config import TrainerConfig
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

    @property
    def nodes(self) -> int:
        return self.draft_tokens or 1 + self.num_steps * self.topk


def verify_bytes(draft: DraftConfig, load: Load, size: int, kept: int) -> float:
    """One verify message of B requests, as wire.FRAMES and wire.encode have it.

    B rows of int32: positions 1, draft_tokens N, parents N, accept_path P, feature_lens 1,
    next_tokens P; topk_ids and topk_logits (float32) N K each, logsumexp N. Features: F of the
    server's dtype for each of B * accept_length rows. The header: what msgpack makes of one with as
    many requests of 32-character ids.
    """
    n, p, k = load.nodes, load.num_steps + 1, min(kept, draft.vocab_size)
    row = 4 * (2 + 3 * n + 2 * p) + 8 * n * k
    return load.running * (row + load.accept_length * draft.feature_size * size) + header_bytes(
        "verify", load, k
    )


def queued_row_bytes(draft: DraftConfig, load: Load, size: int, kept: int) -> int:
    """One request's verify step while it waits in the publisher's queue on CUDA, as
    capture.Capture.verify stages it.

    Not packed yet: features of all P rows. topk_ids (int32) and topk_logits (the server's dtype) N
    K each, logsumexp, draft_tokens and a tree's two links (int64) N each, accept_index and
    next_tokens (int32) P each, position and length (int64). On the CPU the raw logits (V a node)
    wait instead of the kept ones.
    """
    n, p = load.nodes, load.num_steps + 1
    kept = min(kept, draft.vocab_size)
    ids = 1 if load.topk == 1 else 3
    features, logits = p * draft.feature_size * size, n * kept * (4 + size)
    return features + logits + n * (4 + ids * 8) + p * 2 * 4 + 2 * 8


def prefill_bytes(draft: DraftConfig, tokens: int, size: int) -> float:
    """One request's chunk of a prefill message: five int32, and for each token its id and F
    features. Plus a header, though several requests may share one."""
    return (
        20 + tokens * (4 + draft.feature_size * size) + header_bytes("prefill", Load(running=1), 0)
    )


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


def shapes(draft: DraftConfig, target: Target) -> dict[str, tuple[int, ...]]:
    """Every tensor of the draft's file but the vocabulary maps, by name: what the server expects to
    be there.
    """
    found = expected_shapes(draft, target.config)
    return {n: shape for n, (shape, needed) in found.items() if needed and n != "d2t"}


def parameter_count(draft: DraftConfig, target: Target) -> int:
    """P#, without the target's embedding."""
    return sum(map(math.prod, shapes(draft, target).values()))


def version_bytes(draft: DraftConfig, target: Target, size: int) -> int:
    """model.safetensors without its header of a few kB: P# in the server's dtype, and for a reduced
    vocabulary d2t (int64 [VD]) and t2d (bool [V])."""
    maps = (
        0
        if draft.draft_vocab_size == draft.vocab_size
        else COUNTER * draft.draft_vocab_size + draft.vocab_size
    )
    return parameter_count(draft, target) * size + maps


def checkpoint_bytes(
    draft: DraftConfig, target: Target, compute: int, average: bool = False
) -> int:
    """state.safetensors: the draft as it computes, masters and AdamW's moments
    (optimizer.Optimizer.state_dict), and the running mean.

    The host holds as much: the memory of the last snapshot (training_state.copied).
    """
    return parameter_count(draft, target) * (compute + MASTER + MOMENTS + MASTER * average)


def rank_bytes(draft: DraftConfig, target: Target, tp: int, size: int) -> int:
    """A draft's parameters on one tensor-parallel rank.

    SGLang shards attention, MLP and head; fc and the norms are whole on each. The plugin holds two
    more drafts than EAGLE3: the staged and the previous version (serve/staging.py:
    reserve_staging_memory).
    """
    whole = ("fc.", "norm.", "hidden_norm.", "layernorm.", "input_norm.", "fc_norm.")
    found = shapes(draft, target)
    return size * sum(
        math.prod(s) if any(w in n for w in whole) else math.ceil(math.prod(s) / tp)
        for n, s in found.items()
    )


def trainer_device_bytes(
    draft: DraftConfig, target: Target, trainer: TrainerConfig, compute: int, load: Load
) -> dict[str, int]:
    """What is on the trainer's device at the peak of a step, for c bytes of the dtype that it
    computes in.

    weights     c P#, and 4 P# of float32 masters if c < 4 (otherwise the weights are the
                masters)
    moments     8 P# (AdamW)
    average     4 P# of the running mean, if it is on, and c P# of the draft that it is scored in
    gradients   c P#, and 4 P# for their float32 copies if c < 4 (Optimizer.step)
    served      2 c P#: the frozen copies that the gate scores, of the served and of the initial
                weights (served.Served; one and the same until the first version)
    embedding   c V H, shared by both
    loss        the head's gradient in float32, twice (tree_loss keeps it, then scales it); a chunk
                of logits, twice
    activations rows of `activation_bytes`, for a batch of batch.max_positions positions that all
    have a target
    """
    count, c = parameter_count(draft, target), compute
    head = 4 * draft.draft_vocab_size * draft.hidden_size
    depth = trainer.batch.depth or load.num_steps
    rows = trainer.batch.max_positions
    return {
        "weights_bytes": count * (c + (MASTER if c < 4 else 0)),
        "moments_bytes": count * MOMENTS,
        "average_bytes": count * (MASTER + c) if trainer.optimizer.average else 0,
        "gradients_bytes": count * (c + (4 if c < 4 else 0)),
        "served_bytes": 2 * count * c,
        "embedding_bytes": c * draft.vocab_size * (draft.target_hidden_size or draft.hidden_size),
        "loss_bytes": 2 * head + 2 * 4 * max(32 * draft.draft_vocab_size, CHUNK_LOGITS),
        "activations_bytes": activation_bytes(draft, rows, rows, depth, c),
    }


def activation_bytes(draft: DraftConfig, positions: int, rows: int, depth: int, c: int) -> int:
    """What autograd keeps of a step: `positions` packed positions, `rows` of them with a loss at
    each of `depth` levels.

    A position: its features F and, behind fc, the state, both norms' inputs and outputs (6 H), keys
    and values. A row of a level: state in, both halves of the attention's input, its norm's output,
    state out (8 H), queries and attention's output (2 Hq D), the MLP's gate, up, their product and
    what silu keeps (4 I), keys and values of its level and of those above it (they are concatenated
    level by level). What norms keep (4 H of a position, 6 H of a row) and attention's output are
    float32 whatever the dtype: so they are in PyTorch's norm on the CPU and in the reference of
    tree attention, and a fused kernel keeps less.
    """
    h, inner = draft.hidden_size, draft.intermediate_size
    q, kv = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    position = c * (draft.feature_size + 2 * h + 2 * kv) + 4 * 4 * h
    row = c * (2 * h + q + 4 * inner) + 4 * (6 * h + q)
    # level d holds those of levels 1..d
    nodes = c * 2 * kv * (depth - 1) * depth // 2
    return draft.num_hidden_layers * (positions * position + rows * (depth * row + nodes))


def step_flops(draft: DraftConfig, trainer: TrainerConfig, load: Load) -> float:
    """One optimizer step's, without attention's scores: 6 for each parameter and row that it
    multiplies (forward 2, backward 4). The gate's forward passes come on top, at each publication.
    fc sees each position once, layer and head each row of each level."""
    h, inner = draft.hidden_size, draft.intermediate_size
    q, kv = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    layer = 2 * h * (q + 2 * kv) + q * h + 3 * h * inner
    depth = trainer.batch.depth or load.num_steps
    row = (
        depth * (draft.num_hidden_layers * layer + draft.draft_vocab_size * h)
        + draft.feature_size * h
    )
    return float(trainer.batch.max_positions * row * 6)
