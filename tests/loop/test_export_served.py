"""A published version, exported, is served: by SGLang's own EAGLE3 as it is, by AURORA pruned, and
the output is the target's. Unpruned it accepts exactly what the server that it was published to
accepts.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from drafts import disturb
from rig import START_S, generate, wait_until
from serve import Server
from typer.testing import CliRunner

from aurora_sglang_plugin.weights.writer import WeightsWriter
from aurora_trainer.cli import app
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.tools import sizes

# as chain has them
ARGS = ["--chunked-prefill-size", "64"]
PARAMS = {"max_new_tokens": 40}
# fewer than the draft is right about
KEPT = 30


@pytest.fixture(scope="module")
def served(chain, target, stream, tmp_path_factory):
    """EAGLE3 with the export of what chain serves now, AURORA with its pruned export."""
    folder = tmp_path_factory.mktemp("exported")
    # bits that nobody published before
    version = chain.publish(disturb(chain.draft(0), seed=4242, size=0.001))
    chain.wait_for_version(version)
    counts = torch.tensor(stream).bincount(minlength=chain.draft(0).config.vocab_size).tolist()
    (folder / "counts.json").write_text(json.dumps(counts))
    pruned = ["--draft-vocab", str(KEPT), "--counts", str(folder / "counts.json")]
    for name, more in (("full", []), ("pruned", pruned)):
        result = CliRunner().invoke(app, ["export", str(chain.weights), str(folder / name), *more])
        assert result.exit_code == 0, result.output
    settings = "plugin.capture.enabled=false plugin.speculation.adaptive=false"
    quiet = {"AURORA_SET": f"{settings} weights.directory={folder}/weights"}

    def start(name: str, algorithm: str) -> Server:
        env = quiet if algorithm == "AURORA" else {}
        log = folder / f"{algorithm}.log"
        draft = folder / name
        server = Server(
            target, draft=draft, algorithm=algorithm, args=ARGS, env=env, log=log, timeout_s=START_S
        )
        server.draft, server.weights = draft, folder / "weights"
        return server

    # its threads must outlive the servers, which die with their parent thread
    with ThreadPoolExecutor(2) as pool:
        started = {
            n: pool.submit(start, n, a) for n, a in (("full", "EAGLE3"), ("pruned", "AURORA"))
        }
        try:
            yield {name: future.result() for name, future in started.items()}
        finally:
            for future in started.values():
                if future.exception() is None:
                    future.result().kill()


def test_exports_are_served(served, chain, plain, stream):
    prompts = [stream[36000 + 211 * i : 36000 + 211 * i + 20 + 11 * i] for i in range(6)]
    expected = [answer["output_ids"] for answer in generate(plain, prompts, PARAMS, None)]
    accepted = {}
    for name, server in {"published": chain.server, **served}.items():
        # one by one: the same batches
        answers = [generate(server, [prompt], PARAMS, None)[0] for prompt in prompts]
        assert [answer["output_ids"] for answer in answers] == expected, name
        accepted[name] = [answer["meta_info"]["spec_accept_length"] for answer in answers]
    print({name: round(sum(lengths) / len(lengths), 3) for name, lengths in accepted.items()})
    assert accepted["full"] == accepted["published"]
    mean = {name: sum(lengths) / len(lengths) for name, lengths in accepted.items()}
    # an untrained draft has 1.0
    assert mean["full"] > 1.3
    # it cannot propose the rest
    assert 1 + 0.3 * (mean["full"] - 1) < mean["pruned"] < mean["full"]
    config = json.loads(served["pruned"].draft.joinpath("config.json").read_text())
    assert config["draft_vocab_size"] == KEPT


def test_a_server_that_began_with_an_export_takes_versions(served, chain, stream):
    """What export adds to config.json for others is nothing to the watcher."""
    server = served["pruned"]
    draft = disturb(Draft.load(server.draft, chain.embed), seed=4243, size=0.001)
    writer = WeightsWriter(server.weights)
    about = dict(target=chain.fingerprint, parent=0, optimizer_step=1)
    assert writer.publish(draft.checkpoint(), draft.config.to_json(), **about) == 1
    writer.close()

    def swapped():
        generate(server, [stream[:16]], {"max_new_tokens": 4}, None)
        return "draft swapped version=1 " in server.log.read_text(errors="replace")

    wait_until(swapped, "swap to version 1", 20, every_s=0.3)


def test_messages_are_as_large_as_planned(chain, target, stream):
    """What a real server sent, frame for frame."""
    config = chain.draft(0).config
    before = len(chain.messages)
    chain.taken(
        [a["rid"] for a in chain.generate([stream[39000:39020], stream[39100:39150]], PARAMS)]
    )
    found = [m for m in chain.messages[before:] if m.header.kind == "verify"]
    assert len(found) > 10
    for message in found:
        lens = message.arrays["feature_lens"]
        load = sizes.Load(running=len(lens), num_steps=4, accept_length=float(lens.mean()))
        kept = message.arrays["topk_ids"].shape[2]
        planned = sizes.verify_bytes(config, load, 4, kept) - sizes.header_bytes(
            "verify", load, kept
        )
        assert sum(array.nbytes for array in message.arrays.values()) == round(planned)
