"""AURORA answers as EAGLE3, and refuses what it cannot serve before any model is loaded."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from manifests import MODELS, VERSIONS, WAYS, build, config_text, container
from models import make_random_draft, make_random_target

# The algorithm imports sglang, which takes seconds: one process-wide import for the tests that need
# it.


@pytest.fixture(scope="module")
def algorithm():
    from aurora_sglang_plugin import algorithm

    return algorithm


def test_every_predicate_answers_as_eagle3(algorithm):
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    aurora = algorithm.AuroraAlgorithm(
        name="AURORA", factory=lambda _: object, supports_overlap=True
    )
    eagle3 = SpeculativeAlgorithm.EAGLE3
    names = [
        n for n, m in vars(SpeculativeAlgorithm).items() if inspect.isfunction(m) and n[0] != "_"
    ]
    predicates = [n for n in names if len(inspect.signature(getattr(eagle3, n)).parameters) == 0]
    assert {"is_eagle3", "supports_mixed_chunk", "need_topk", "carries_draft_hidden_states"} <= {
        *predicates
    }
    assert {n: getattr(aurora, n)() for n in predicates} == {
        n: getattr(eagle3, n)() for n in predicates
    }
    assert aurora in (eagle3,) and aurora != SpeculativeAlgorithm.EAGLE and {eagle3: 1}[aurora]
    # What takes arguments is the enum's own function, or written here; nothing of the enum is
    # missing.
    own = {"create_worker", "handle_server_args"}
    for name in set(names) - set(predicates) - own:
        assert (
            inspect.getattr_static(algorithm.AuroraAlgorithm, name)
            is vars(SpeculativeAlgorithm)[name]
        ), name


def test_registers_under_its_name(algorithm):
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.speculative.spec_registry import _REGISTRY

    _REGISTRY.pop("AURORA", None)
    algorithm.register()
    assert isinstance(SpeculativeAlgorithm.from_string("aurora"), algorithm.AuroraAlgorithm)


@pytest.mark.parametrize("version", ["0.5.16", "0.5.24", "0.6.0", "0.4.9.post1"])
def test_refuses_an_sglang_it_was_not_written_for(algorithm, version):
    with pytest.raises(ValueError, match=rf"0\.5\.17 to 0\.5\.23 .*{version}"):
        algorithm.check_sglang_version(version)


@pytest.mark.parametrize("version", ["0.5.17", "0.5.20.post2", "0.5.23"])
def test_accepts_the_versions_it_was_written_for(algorithm, version):
    algorithm.check_sglang_version(version)


def test_trees_need_a_draft_from_the_start(algorithm, monkeypatch):
    monkeypatch.setattr(algorithm, "version", lambda _: "0.5.23")
    aurora = algorithm.AuroraAlgorithm(name="AURORA", factory=lambda _: object)
    arguments = SimpleNamespace(
        enable_multi_layer_eagle=False, speculative_draft_model_path=None, speculative_eagle_topk=2
    )
    with pytest.raises(ValueError, match="--speculative-draft-model-path"):
        aurora.handle_server_args(arguments)


@pytest.mark.parametrize(
    "requested, draft, target, fits",
    [
        ("auto", "bfloat16", "bfloat16", True),
        # SGLang would run the draft in float16
        ("auto", "float32", "bfloat16", False),
        ("auto", "float32", "float16", True),
        ("auto", "float16", "bfloat16", False),
        ("auto", "float32", None, True),
        ("bfloat16", "float32", "float16", True),
    ],
)
def test_draft_and_target_run_in_one_dtype(algorithm, requested, draft, target, fits):
    configs = {"dtype": draft}, {"torch_dtype": target}
    if fits:
        return algorithm.check_dtype(requested, *configs)
    with pytest.raises(ValueError, match=f"--dtype {target}"):
        algorithm.check_dtype(requested, *configs)


# What SGLang makes of command lines, in one process of their own: resolving leaves its traces.
RESOLVE = """
import json, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
for line in json.loads(sys.argv[1]):
    environment = [word for word in line if word.startswith(("SGLANG_", "AURORA_"))]
    os.environ |= dict(word.split("=") for word in environment)
    try:
        args = prepare_server_args([word for word in line if word not in environment])
        args.resolve_once()
        print("RESULT", json.dumps([None, args.host, args.port, args.enable_metrics]))
    except ValueError as error:
        print("RESULT", json.dumps([str(error)]))
    for word in environment:
        del os.environ[word.split("=")[0]]
"""
UNQUANT = "add --speculative-draft-model-quantization unquant"
OPTIONS = {
    "": "",
    "--quantization fp8": UNQUANT,
    "--speculative-draft-model-quantization fp8": UNQUANT,
    "--quantization fp8 --speculative-draft-model-quantization unquant": "",
    "--quantization unquant": "",
    "--speculative-draft-window-size 64": "start without --speculative-draft-window-size",
    "--load-format dummy": "--load-format dummy makes up",
    "SGLANG_SIMULATE_ACC_LEN=2.5": "SGLANG_SIMULATE_ACC_LEN makes up",
    "SGLANG_SIMULATE_UNIFORM_EXPERTS=1": "SGLANG_SIMULATE_UNIFORM_EXPERTS makes up",
    "SGLANG_SIMULATE_ACC_LEN=-1": "",
    "--attention-backend torch_native": "torch_native cannot draft on the CPU; expected intel_amx",
    "--decode-attention-backend triton": "start without --decode-attention-backend",
    "--speculative-draft-attention-backend triton": "start without --speculative-draft-attention",
    "--attention-backend intel_amx --page-size 16": "",
}


def deployed(folder: Path) -> list[list[str]]:
    """The servers' commands in docs/deploy, on this machine; none if there is no kubectl."""
    lines = []
    for way in WAYS:
        try:
            objects = build(way)
        except pytest.skip.Exception:
            return []
        (folder / "aurora.toml").write_text(config_text(objects))
        server = container(objects, "Deployment")
        assert server["command"][1:] == ["-m", "sglang.launch_server"]
        text = " ".join(server["args"])
        text = text.replace(MODELS, str(folder)).replace(VERSIONS, str(folder))
        own = f"AURORA_CONFIG={folder}/aurora.toml --device cpu --dtype bfloat16"
        lines.append(f"{text} {own}".split())
    return lines


@pytest.fixture(scope="module")
def resolved(tmp_path_factory):
    """[error, host, port, metrics] of a command with each of OPTIONS, and of docs/deploy's."""
    folder = tmp_path_factory.mktemp("resolved")
    target = make_random_target(folder / "target")
    draft = make_random_draft(folder / "draft", target, aux_layer_ids=[0, 2, 4])
    line = f"--model-path {target} --device cpu --dtype bfloat16 --speculative-algorithm AURORA "
    line += (
        f"--speculative-draft-model-path {draft} --speculative-num-steps 2"
        " --speculative-eagle-topk 1"
    )
    lines = [f"{line} {more}".split() for more in OPTIONS] + deployed(folder)
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1"}
    command = [sys.executable, "-c", RESOLVE, json.dumps(lines)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = [text.partition("RESULT ")[2] for text in done.stdout.splitlines() if "RESULT" in text]
    found = [json.loads(text) for text in found]
    assert len(found) == len(lines)
    return found[: len(OPTIONS)], found[len(OPTIONS) :]


def test_options_that_aurora_cannot_serve_are_refused_with_their_remedy(resolved):
    """Before anything is loaded; the draft inherits the target's quantization unless it is told not
    to.
    """
    for (option, says), (error, *_) in zip(OPTIONS.items(), resolved[0], strict=True):
        assert says in error if says else not error, (option, error)


def test_the_commands_of_the_manifests_are_taken(resolved):
    if not resolved[1]:
        pytest.skip("no kubectl: `make setup` installs one on Linux")
    assert resolved[1] == [[None, "0.0.0.0", 30000, True]] * len(WAYS)


@pytest.mark.parametrize(
    "text, says",
    [
        ("[plugin.capture]\nsample_rate = 2", "plugin.capture.sample_rate"),
        ("[plugin.captur]\n", "plugin.captur"),
        ("[link", "aurora.toml"),
        (None, "aurora.toml"),
    ],
)
def test_a_bad_configuration_is_refused_before_anything_is_loaded(
    algorithm, monkeypatch, tmp_path, text, says
):
    path = tmp_path / "aurora.toml"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("AURORA_CONFIG", str(path))
    aurora = algorithm.AuroraAlgorithm(name="AURORA", factory=lambda _: object)
    arguments = SimpleNamespace(enable_multi_layer_eagle=False, speculative_draft_model_path=None)
    with pytest.raises(ValueError) as error:
        aurora.handle_server_args(arguments)
    assert says in str(error.value) and str(path) in str(error.value)


# The entry point


def test_a_failure_to_register_is_kept_and_logged(algorithm, monkeypatch, caplog):
    from aurora_sglang_plugin import plugin

    def fail():
        raise RuntimeError("no such seam")

    monkeypatch.setattr(plugin, "failure", None)
    monkeypatch.setattr(algorithm, "register", fail)
    # SGLang swallows it
    with pytest.raises(RuntimeError):
        plugin.register()
    assert plugin.failure == "RuntimeError: no such seam" and "no such seam" in caplog.text


def test_a_released_request_is_told_to_the_worker_where_there_is_one(monkeypatch):
    from aurora_sglang_plugin import plugin

    name, told = "aurora_sglang_plugin.attached", []
    monkeypatch.delitem(sys.modules, name, raising=False)
    plugin._on_release("request", None)
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(on_release=told.append))
    plugin._on_release("request", None, is_insert=False)
    assert told == ["request"]
