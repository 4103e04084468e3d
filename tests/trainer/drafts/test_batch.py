from dataclasses import replace

import pytest
import torch
from naive_draft import CONFIG, VARIANTS, Naive, make
from random_sample import random_sample

from aurora_trainer.drafts.batch import BatchConfig, group, pack, upload


def naive_levels(sample, depth, rejected=True):
    """Each level as a sorted list of (tokens of the query's path, position, positions it sees,
    target node, accepted).
    """
    levels = [[] for _ in range(depth)]
    positions = len(sample.features)

    def position_target(i):
        node = int(sample.position_node[i])
        return -1 if node < 0 or sample.node_altered[node] else node

    for i in range(max(sample.prompt_len - 1 - sample.start, 0), positions):
        for d in range(depth):
            if i + d < positions:
                path = tuple(sample.tokens[i + 2 : i + 2 + d].tolist())
                levels[d].append((path, sample.start + i + d, i + 1, position_target(i + d), True))
    for u in range(len(sample.node_token)) if rejected else ():
        d = int(sample.node_depth[u])
        if (
            not 1 <= d < min(depth, sample.num_steps)
            or sample.node_accepted[u]
            or sample.node_altered[u]
        ):
            continue
        path, at = [], u
        while sample.node_parent[at] >= 0:
            path.insert(0, int(sample.node_token[at]))
            at = int(sample.node_parent[at])
        position = int(sample.node_position[u])
        levels[d].append((tuple(path), sample.start + position + d, position + 1, u, False))
    return [sorted(level) for level in levels]


def unpacked(samples, config):
    """The same lists, one per sample, read back from the packed batch."""
    batch = pack(samples, config)
    first_position = [0]
    for s in samples:
        first_position.append(first_position[-1] + len(s.features))
    node_tokens = torch.cat(
        [level.tokens for level in batch.levels[1:]] or [torch.empty(0, dtype=torch.int64)]
    )
    out = [[[] for _ in batch.levels] for _ in samples]
    for d, level in enumerate(batch.levels):
        assert level.ancestors.shape == (len(level), d)
        for q in range(len(level)):
            n = int(batch.base_sample[level.base[q]])
            s = samples[n]
            assert level.context_start[q] == first_position[n]
            assert batch.levels[0].context_end[level.base[q]] == level.context_end[q]
            path = tuple(node_tokens[level.ancestors[q]].tolist())
            target = -1
            if level.target[q] >= 0:
                row = int(level.target[q])
                same = (s.logsumexp == batch.logsumexp[row]).nonzero()[:, 0]
                assert len(same) == 1
                target = int(same[0])
                assert torch.equal(batch.topk_ids[row][: s.topk_ids.shape[1]], s.topk_ids[target])
                assert (batch.topk_ids[row][s.topk_ids.shape[1] :] == -1).all()
            sees = int(level.context_end[q]) - first_position[n]
            out[n][d].append((path, int(level.positions[q]), sees, target, bool(level.accepted[q])))
    return [[sorted(level) for level in levels] for levels in out]


@pytest.mark.parametrize(
    "shape",
    [
        {}, {"topk": 1}, {"prompt_len": 1}, {"verifies": 0}, {"verifies": 1, "num_steps": 1},
        {"altered": 0.5},
        {"start": 2}, {"start": 6, "verifies": 8}, {"kept": 3}, {"num_steps": 5, "width": 2},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("depth", [0, 1, 2, 7])
def test_levels_are_those_that_enumeration_finds(shape, depth):
    """Packed behind and before other samples, of other depth and other K."""
    for seed in range(3):
        sample = random_sample(seed, **shape)
        # trees that hung from positions which were cut off
        if sample.start > 4:
            keep = sample.node_position >= 0
            assert not keep.all()
            first = int(keep.nonzero()[0])
            assert keep[first:].all()
            sample = drop_first_nodes(sample, first)
        samples = [random_sample(90, topk=1), sample, random_sample(91, prompt_len=2)]
        levels = depth or max(s.num_steps for s in samples)
        got = unpacked(samples, BatchConfig(depth=depth))
        for s, own in zip(samples, got, strict=True):
            assert own == naive_levels(s, levels)
        without = unpacked(samples, BatchConfig(depth=depth, rejected=False))
        assert without[1] == naive_levels(sample, levels, rejected=False)


def drop_first_nodes(s, first):
    node = {f: getattr(s, f)[first:] for f in (
        "node_token", "node_depth", "node_position", "node_accepted", "node_altered", "topk_ids",
        "topk_logits", "logsumexp"
    )}  # fmt: skip
    trees = s.tree_first >= first
    return replace(
        s,
        **node,
        node_parent=(s.node_parent[first:] - first).clamp_min(-1),
        position_node=torch.where(s.position_node >= first, s.position_node - first, -1),
        tree_first=s.tree_first[trees] - first,
        tree_version=s.tree_version[trees],
    )


@pytest.mark.parametrize("name", ["plain", "norm_output", "two layers"])
def test_states_of_a_packed_batch_equal_one_token_at_a_time(name):
    """The whole arm: packing, parents, ancestors, positions and the draft, against a growing KV
    cache per path.
    """
    draft = make(VARIANTS[name])
    naive = Naive(draft)
    samples = [random_sample(0, verifies=3), random_sample(1, verifies=3, topk=1, start=2)]
    batch = pack(samples, BatchConfig())
    batch.features = batch.features.double()
    got = draft.states(batch)
    node_tokens = torch.cat([level.tokens for level in batch.levels[1:]])
    # after every position: (state, cache)
    caches = []
    for s in samples:
        cache = [[] for _ in draft.layers]
        for i in range(len(s.features)):
            feature = naive.project(s.features[i].double())
            state, _, cache = naive.step(s.tokens[i + 1], feature, s.start + i, cache)
            caches.append((state, cache))
    for d, level in enumerate(batch.levels):
        for q in range(len(level)):
            state, cache = caches[int(level.context_end[q]) - 1]
            position = int(batch.positions[level.context_end[q] - 1])
            for k, node in enumerate(level.ancestors[q]):
                state, _, cache = naive.step(
                    node_tokens[node], naive.carried(state), position + 1 + k, cache
                )
            # rope is float32 once
            torch.testing.assert_close(got[d][q], state, atol=1e-5, rtol=1e-5)


def test_reach_is_the_targets_probability_of_the_path():
    # everything kept
    sample = random_sample(3, kept=50)
    log_p = torch.full((len(sample.node_token), 50), -torch.inf)
    log_p.scatter_(1, sample.topk_ids, sample.topk_logits - sample.logsumexp[:, None])
    batch = pack([sample], BatchConfig())
    checked = 0
    for level in batch.levels:
        assert (level.reach[level.accepted] == 1).all()
        for q in (~level.accepted).nonzero()[:, 0].tolist():
            node = int((sample.logsumexp == batch.logsumexp[level.target[q]]).nonzero())
            want = 0.0
            while (parent := int(sample.node_parent[node])) >= 0:
                want += log_p[parent, sample.node_token[node]]
                node = parent
            torch.testing.assert_close(level.reach[q].log(), want, atol=1e-4, rtol=1e-4)
            checked += 1
    assert checked > 10


def test_group_fills_up_to_max_positions_and_never_splits_a_sample():
    samples = [random_sample(n, verifies=v) for n, v in enumerate((1, 1, 30, 1, 1))]
    groups = list(group(samples, BatchConfig(max_positions=30)))
    assert [[s.request for s in g] for g in groups] == [["r0", "r1"], ["r2"], ["r3", "r4"]]
    assert list(group([], BatchConfig())) == []


def test_counts_are_queries_with_a_loss():
    sample = random_sample(5, altered=0.4)
    batch = pack([sample], BatchConfig())
    want = [
        [sum(q[3] >= 0 and q[4] == a for q in level) for a in (True, False)]
        for level in naive_levels(sample, 3)
    ]
    assert batch.counts().tolist() == want


def test_roots_are_the_positions_that_trees_hang_from():
    sample = random_sample(5)
    batch = pack([random_sample(6), sample], BatchConfig())
    own = batch.base_is_root[batch.base_sample == 1].nonzero()[:, 0] + sample.prompt_len - 1
    assert own.tolist() == sample.node_position[sample.tree_first].tolist()


def test_to_moves_every_tensor():
    packed = pack([random_sample(0)], BatchConfig())
    batch = packed.to("meta")
    assert batch.features.is_meta and all(
        level.reach.is_meta and level.tokens.is_meta for level in batch.levels
    )
    assert (
        batch.on_cpu is packed
        and torch.equal(batch.counts(), packed.counts())
        and batch.to("cpu") is packed
    )
    assert CONFIG.feature_size == batch.features.shape[1]


def test_what_isuploaded_in_one_piece_arrives_as_it_was():
    tensors = [
        torch.arange(5), torch.empty(0, 3, dtype=torch.int64), torch.rand(7, 3).bfloat16(),
        torch.rand(3) > 0.5,
        torch.rand(2, 2), torch.arange(6).view(2, 3).T, torch.empty(4, 0),
    ]  # fmt: skip
    for tensor, copy in zip(tensors, upload(tensors, "cpu"), strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor)
        assert not tensor.numel() or copy.data_ptr() != tensor.data_ptr()
