"""The operator's API under AURORA: whatever is called, the process lives, the draft is the newest
version, a changed target says so and only its own versions are loaded, and the accounting adds up.

One server with trees of one draft step and pages of 16 tokens, in the order of this file. What
needs CUDA (memory that is really given back, updates over CUDA IPC) is tested at the seam:
tests/plugin/serve/test_target_updates.py and test_swap_recovery.py.
"""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from drafts import disturb
from models import make_random_draft, make_random_target
from rig import Loop, checksums, wait_until
from safetensors.torch import load_file, save_file
from serve import free_port
from torch.distributed import distributed_c10d as c10d
from transformers import AutoModelForCausalLM

from aurora_sglang_plugin.weights.manifest import target_fingerprint

PARAMS = {"max_new_tokens": 24}
PROMPTS = [[(7 * i + 3 * k) % 500 for i in range(5 + 11 * k)] for k in range(4)]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another target of the same shape."""
    return make_random_target(tmp_path_factory.mktemp("targets") / "other", tokenizer=True, seed=5)


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("operations")
    target = make_random_target(folder / "target", tokenizer=True)
    draft = make_random_draft(folder / "draft", target, aux_layer_ids=[0, 2, 4])
    args = ["--chunked-prefill-size", "32", "--page-size", "16"]
    loop = Loop(folder, target, draft, topk=1, num_steps=1, args=args)
    loop.wait_for_version(loop.publish(disturb(loop.draft(0), seed=1, size=0.1)))
    yield loop
    loop.stop()


@pytest.fixture(scope="module")
def expected(loop):
    """What the target says without any server."""
    model = AutoModelForCausalLM.from_pretrained(loop.target, dtype=torch.float32).eval()
    greedy = dict(do_sample=False, eos_token_id=None, pad_token_id=0, **PARAMS)

    def say(prompt):
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
        return whole[0, len(prompt) :].tolist()

    return [say(prompt) for prompt in PROMPTS]


def outputs(loop) -> list[list[int]]:
    return [answer["output_ids"] for answer in loop.generate(PROMPTS, PARAMS)]


def call(loop, path, body=None) -> tuple[bool, str]:
    """Whether the server says that it did what it was told, and what it says."""
    try:
        answer = loop.server.post(path, body or {})
    except urllib.error.HTTPError as error:
        answer = {"success": False, **json.loads(error.read())}
    return (answer or {}).get("success", True), str(answer)


def draft_of(loop) -> dict:
    """Checksums of the draft's own parameters."""
    return {
        name: sum_
        for name, sum_ in checksums(loop.server, "draft").items()
        if "embed_tokens" not in name
    }


def captured_target(loop) -> str:
    """The fingerprint in what the server captures now."""
    outputs(loop)
    loop.quiet()
    return loop.messages[-1].header.target


@contextmanager
def unharmed(loop, target_stays=True) -> Iterator[None]:
    """What is done meanwhile leaves the draft as it is; the target too, unless it is said to
    change.
    """
    draft, target = draft_of(loop), checksums(loop.server, "target")
    version, changes, swaps = (
        loop.metrics()[f"aurora_{n}"] for n in ("draft_version", "target_changes", "swaps")
    )
    yield
    assert loop.server.process.poll() is None
    assert draft_of(loop) == draft
    assert (checksums(loop.server, "target") == target) is target_stays
    outputs(loop)
    # which waits for the metrics to follow
    loop.quiet()
    found = loop.metrics()
    assert found["aurora_draft_version"] == version and found["aurora_swaps"] == swaps
    assert (found["aurora_target_changes"] == changes) is target_stays
    assert found["aurora_capture_errors"] == 0


def test_the_targets_own_directory(loop, expected):
    """It ended the server: SGLang tried the target's tensors on the draft."""
    with unharmed(loop):
        success, text = call(loop, "/update_weights_from_disk", {"model_path": str(loop.target)})
        assert success and "The draft is AURORA's and stays at version 1" in text, text
    assert outputs(loop) == expected and captured_target(loop) == loop.fingerprint


def test_another_target_and_back(loop, other, expected):
    with unharmed(loop, target_stays=False):
        assert call(loop, "/update_weights_from_disk", {"model_path": str(other)})[0]
    assert captured_target(loop) == target_fingerprint(str(other)) != loop.fingerprint
    assert outputs(loop) != expected
    version = loop.publish(disturb(loop.draft(0), seed=2, size=0.1))
    wait_until(
        lambda: loop.metrics()["aurora_weights_refused{target}"] == 1,
        "a refusal of the old target's version",
    )
    assert loop.version() == version - 1
    assert call(loop, "/update_weights_from_disk", {"model_path": str(loop.target)})[0]
    # nothing new was published: it is this server's target again
    loop.wait_for_version(version)
    assert outputs(loop) == expected and captured_target(loop) == loop.fingerprint


def test_updates_that_fail(loop, other, expected, tmp_path):
    """A directory that is not there, and two whose tensors do not fit: the target is what it
    was.
    """
    broken = make_random_target(tmp_path / "broken", vocab=600, tokenizer=True)
    half = tmp_path / "half"
    half.mkdir()
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, half / "model.safetensors")
    (half / "config.json").write_text((other / "config.json").read_text())
    with unharmed(loop):
        for path in (tmp_path / "nowhere", broken, half):
            success, text = call(loop, "/update_weights_from_disk", {"model_path": str(path)})
            assert not success, text
    assert outputs(loop) == expected and captured_target(loop) == loop.fingerprint


def tensors(shape: int = 64) -> dict:
    """A norm of the target, as SGLang's MultiprocessingSerializer would send it; for one call."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump([("model.norm.weight", torch.linspace(0.1, 2, shape))])
    return {"serialized_named_tensors": [base64.b64encode(buffer.getvalue()).decode()]}


def test_tensors_in_a_session(loop, other, expected):
    with unharmed(loop):
        # no session
        assert not call(loop, "/update_weights_from_tensor", tensors())[0]
        assert call(loop, "/begin_weight_update", {"selector": "draft"})[0]
        success, text = call(loop, "/update_weights_from_tensor", tensors() | {"selector": "draft"})
        assert not success and "published instead" in text
        assert call(loop, "/end_weight_update")[0]
    for selector in ("all", "target"):
        with unharmed(loop, target_stays=False):
            assert call(loop, "/begin_weight_update", {"selector": selector})[0]
            body = tensors(63) | {"selector": selector}
            success, text = call(loop, "/update_weights_from_tensor", body)
            assert not success and "may hold a part" in text
            body = tensors() | {"selector": selector}
            success, text = call(loop, "/update_weights_from_tensor", body)
            assert success, text
            assert call(loop, "/end_weight_update")[0]
        assert captured_target(loop) not in (loop.fingerprint, target_fingerprint(str(other)))
        assert outputs(loop) != expected
        assert call(loop, "/update_weights_from_disk", {"model_path": str(loop.target)})[0]
        assert outputs(loop) == expected and captured_target(loop) == loop.fingerprint


def test_tensors_by_a_process_group(loop, expected):
    port, name = free_port(), "updates"
    about = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    about |= {"group_name": name, "backend": "gloo"}
    norm = torch.linspace(2, 0.1, 64)
    body = {
        "names": ["model.norm.weight"],
        "dtypes": ["float32"],
        "shapes": [[64]],
        "group_name": name,
    }

    with ThreadPoolExecutor(1) as pool, unharmed(loop, target_stays=False):
        joined = pool.submit(call, loop, "/init_weights_update_group", about)
        store, *_ = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", 0, 2))
        store = c10d.PrefixStore(name, store)
        backend = c10d.Backend("gloo")
        group, _ = c10d._new_process_group_helper(
            2, 0, [], backend, store, group_name=name, timeout=timedelta(seconds=60)
        )
        assert joined.result(60)[0], joined.result()
        assert call(loop, "/begin_weight_update", {})[0]
        done = pool.submit(call, loop, "/update_weights_from_distributed", body)
        group.broadcast([norm], c10d.BroadcastOptions()).wait()
        assert done.result(60)[0], done.result()
        assert call(loop, "/end_weight_update")[0]
    assert captured_target(loop) != loop.fingerprint
    call(loop, "/destroy_weights_update_group", {"group_name": name})
    assert call(loop, "/update_weights_from_disk", {"model_path": str(loop.target)})[0]
    assert outputs(loop) == expected and captured_target(loop) == loop.fingerprint


def test_memory_and_resets(loop, expected):
    """Without a memory saver nothing is given back; SGLang's own test call does overwrite the
    draft.
    """
    with unharmed(loop):
        call(loop, "/release_memory_occupation", {})
        call(loop, "/resume_memory_occupation", {})
    assert outputs(loop) == expected
    with unharmed(loop, target_stays=False):
        assert call(loop, "/weights_checker", {"action": "reset_tensors", "selector": "draft"})[0]
    assert call(loop, "/update_weights_from_disk", {"model_path": str(loop.target)})[0]
    assert outputs(loop) == expected and captured_target(loop) == loop.fingerprint


def test_calls_that_concern_no_weights(loop, expected):
    with unharmed(loop):
        assert not call(
            loop, "/load_lora_adapter", {"lora_name": "a", "lora_path": str(loop.folder)}
        )[0]
        assert not call(loop, "/unload_lora_adapter", {"lora_name": "a"})[0]
        assert call(loop, "/update_weight_version", {"new_version": "two"})[0]
    assert outputs(loop) == expected
    # Nobody can tell what an update wrote before it failed: an update from disk makes it certain
    # again.
    assert not call(loop, "/update_weights_from_ipc", {"zmq_handles": {}})[0]
    assert captured_target(loop) != loop.fingerprint
    assert call(loop, "/update_weights_from_disk", {"model_path": str(loop.target)})[0]
    assert outputs(loop) == expected and captured_target(loop) == loop.fingerprint


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_pause_flush_continue_under_load(loop, mode):
    """Output across a pause is what it is without one; what is computed again is a new sample."""
    batch = [[(11 * i + 5 * k) % 490 for i in range(9 + 13 * k)] for k in range(6)]
    whole = [a["output_ids"] for a in loop.generate(batch, {"max_new_tokens": 400})]
    rids = [f"{mode}-{i}" for i in range(6)]
    # What came of the requests above must not be taken for the first step of those below.
    loop.quiet()
    seen = len(loop.messages)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(loop.generate, batch, {"max_new_tokens": 400}, rids)

        def under_way() -> bool:
            loop.drain()
            return any(m.header.kind == "verify" for m in loop.messages[seen:])

        wait_until(under_way, "the first verify step")
        loop.server.post("/pause_generation", {"mode": mode})
        time.sleep(0.2)
        assert mode == "abort" or not running.done()
        if mode == "retract":
            loop.server.get("/flush_cache")
        if mode == "in_place":
            body = {"model_path": str(loop.target), "flush_cache": False}
            assert call(loop, "/update_weights_from_disk", body)[0]
        loop.server.post("/continue_generation", {})
        answers = running.result(60)
    if mode == "abort":
        assert all(a["output_ids"] == w[: len(a["output_ids"])] for a, w in zip(answers, whole))
    else:
        assert [a["output_ids"] for a in answers] == whole
    samples = loop.taken(rids)
    for rid, prompt, output in zip(rids, batch, whole):
        for sample in samples[rid]:
            tokens = (prompt + output)[sample.start : sample.start + len(sample.tokens)]
            assert sample.tokens.tolist() == tokens
    reasons = [r for m in loop.messages[seen:] if m.header.kind == "end" for r in m.header.reasons]
    assert ("retract" in reasons) is (mode == "retract"), reasons
    ledger = loop.quiet()
    assert ledger["lost"] == ledger["rejected"] == 0


def test_abort_all_under_load(loop, expected):
    with ThreadPoolExecutor(1) as pool:
        rids = [f"all-{i}" for i in range(4)]
        running = pool.submit(loop.generate, PROMPTS, {"max_new_tokens": 900}, rids)
        time.sleep(0.5)
        loop.server.post("/abort_request", {"rid": "", "abort_all": True})
        answers = running.result(60)
    assert {a["meta_info"]["finish_reason"]["type"] for a in answers} == {"abort"}
    loop.taken([a["rid"] for a in answers])
    ledger = loop.quiet()
    assert ledger["lost"] == ledger["rejected"] == 0
    assert outputs(loop) == expected


def test_a_session_of_turns(loop):
    """SGLang itself puts the turns before into the prompt; a sample begins where the cache
    ended.
    """
    session = loop.server.post("/open_session", {"capacity_of_str_len": 4000})
    told, rid = [], None
    for turn in range(3):
        new = [(13 * turn + 3 * i) % 450 for i in range(30)]
        params = {"temperature": 0, "ignore_eos": True, **PARAMS}
        body = {"input_ids": new, "sampling_params": params, "rid": f"turn-{turn}"}
        answer = loop.server.post(
            "/generate", body | {"session_params": {"id": session, "rid": rid}}
        )
        rid = answer["meta_info"]["id"]
        told += new + answer["output_ids"]
        (sample,) = loop.taken([rid])[rid]
        assert sample.start == answer["meta_info"]["cached_tokens"] and (sample.start > 0) is (
            turn > 0
        )
        assert sample.tokens.tolist() == told[sample.start : sample.start + len(sample.tokens)]
        assert sample.start + len(sample.tokens) == len(told)
    loop.server.post("/close_session", {"session_id": session})
    ledger = loop.quiet()
    assert ledger["lost"] == ledger["rejected"] == 0
