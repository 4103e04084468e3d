"""Samples that are assembled from a simulated server's messages, checked against what it knows,
position by position and node by node.
"""

from simulator import S, Server, token

from aurora_trainer.intake.assemble import AssembleConfig, Assembler

WHOLE = AssembleConfig(part_positions=10_000, context_positions=0)


def assemble(server, config=WHOLE):
    assembler = Assembler(config)
    samples = []
    for message in server.run():
        if message is not None:
            samples += assembler.add(message)
    assembler.idle(0.0)
    samples += assembler.idle(config.idle_s)
    assert assembler.open_requests == 0 and assembler.nbytes == 0
    return samples, assembler


def check(sample, server):
    """Every value of the sample against the truth.

    Returns (request number, numbers of its trees).
    """
    length, start = len(sample.features), sample.start
    number = int(sample.features[0, 0])
    request = server.requests[number]
    assert sample.request == request.rid
    truth = [[number, p, token(number, p)] for p in range(start, start + length)]
    assert sample.features.tolist() == truth
    assert sample.tokens.tolist() == [token(number, p) for p in range(start, start + length + 1)]
    assert sample.position_version.shape == (length,)
    assert sample.num_steps == S and sample.topk == 2

    firsts = [*sample.tree_first.tolist(), len(sample.node_token)]
    numbers = []
    for g, (first, end) in enumerate(zip(firsts, firsts[1:])):
        uid, root_index = divmod(int(sample.logsumexp[first]) - 1, 64)
        tree = server.trees[uid]
        numbers.append(uid)
        assert root_index == 0 and tree.number == number
        used = [i for i, parent in enumerate(tree.parents) if parent != -2]
        assert ((sample.logsumexp[first:end] - 1) % 64).tolist() == used
        assert sample.topk_ids[first:end, 0].tolist() == [uid * 8 + i for i in used]
        assert sample.node_token[first:end].tolist() == [tree.tokens[i] for i in used]
        parents = [-1 if tree.parents[i] < 0 else first + used.index(tree.parents[i]) for i in used]
        assert sample.node_parent[first:end].tolist() == parents
        assert sample.node_position[first:end].tolist() == [tree.root - 1 - start] * len(used)
        assert 0 <= tree.root - 1 - start < length
        depth = sample.node_depth[first:end].tolist()
        assert depth == [0, *(depth[parent - first] + 1 for parent in parents[1:])]
        at_most = [node for k, node in enumerate(tree.path) if tree.root + k <= start + length]
        accepted = [i for i, on in zip(used, sample.node_accepted[first:end].tolist()) if on]
        assert accepted == sorted(at_most[: len(accepted)]) and accepted[0] == 0
        assert sample.tree_version[g] == tree.version
        assert set(sample.node_altered[first:end].tolist()) == {tree.altered}
    positions = (sample.position_node >= 0).nonzero().flatten()
    nodes = sample.position_node[positions]
    # it stands where the position's token does
    assert (sample.node_position + sample.node_depth)[nodes].equal(positions)
    assert (
        sample.node_token[nodes].equal(sample.tokens[positions + 1])
        and sample.node_accepted[nodes].all()
    )
    return number, numbers


def one_request(length=30):
    server = Server(3, requests=1, odd=False)
    server.requests[0].total_len = server.requests[0].prompt_len + length
    return server, list(server.run())
