"""One TOML file configures both sides: `[link]` and `[weights]` are shared, `[plugin.*]` is read in
the server, `[trainer.*]` by the trainer (`aurora_trainer.config` adds those sections to this
model).

The server finds the file through AURORA_CONFIG; AURORA_SET="plugin.capture.sample_rate=0.1
link.endpoint=..." overrides single keys. Unknown keys are errors. This module imports neither torch
nor sglang.
"""

from __future__ import annotations

import os
import shlex
import tomllib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from aurora_kernels.limits import MAX_KEPT
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from aurora_sglang_plugin.endpoint import check_endpoint, is_local

ENV_CONFIG = "AURORA_CONFIG"
ENV_SET = "AURORA_SET"

C = TypeVar("C", bound=BaseModel)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinkConfig(Section):
    """The ZeroMQ link. The trainer binds, every server connects."""

    # where servers connect, and where the trainer binds unless `bind` is set: `ipc://PATH` or
    # `tcp://HOST:PORT`; beyond loopback only with keys
    endpoint: str = "tcp://127.0.0.1:5590"
    # where the trainer binds, if that is written differently: `tcp://0.0.0.0:5590` for every
    # interface
    bind: str | None = None
    # directory of the trainer's secret key and of the servers that it lets in, from `aurora-trainer
    # keygen` ([security](security.md)); set both or neither
    trainer_keys: Path | None = None
    # directory of a server's secret key and the trainer's public one
    server_keys: Path | None = None
    # true: without keys too, prompts may travel beyond this machine, readable and changeable by
    # whoever is on the way
    insecure_plaintext_beyond_loopback: bool = False
    # a larger message is neither sent nor accepted
    max_message_bytes: PositiveInt = 64 << 20

    @property
    def bound(self) -> str:
        """Where the trainer binds."""
        return self.endpoint if self.bind is None else self.bind

    @model_validator(mode="after")
    def _private(self) -> LinkConfig:
        check_endpoint("link.endpoint", self.endpoint, wildcard=False)
        check_endpoint("link.bind", self.bound, wildcard=True)
        if (self.trainer_keys is None) != (self.server_keys is None):
            raise ValueError(
                "link.trainer_keys and link.server_keys: expected both or neither, in the one file"
                " of both sides (each side reads its own directory only)"
            )
        for name, endpoint in (("endpoint", self.endpoint), ("bind", self.bound)):
            if self.trainer_keys or self.insecure_plaintext_beyond_loopback or is_local(endpoint):
                continue
            raise ValueError(
                f"link.{name} {endpoint!r} leaves this machine and nothing would be encrypted;"
                " expected ipc://PATH or tcp://127.0.0.1:PORT, or keys in link.trainer_keys and"
                " link.server_keys (aurora-trainer keygen). Who trusts the network with every"
                " prompt says link.insecure_plaintext_beyond_loopback = true"
            )
        return self


class WeightsConfig(Section):
    """The shared directory through which weights travel."""

    # one directory for each target; the trainer writes it, servers read it
    directory: Path = Path("aurora-weights")


class CaptureConfig(Section):
    """What is taken from the verify step."""

    # false: serve and swap, publish nothing
    enabled: bool = True
    # of requests, by a hash of the request id
    sample_rate: Annotated[float, Field(ge=0, le=1)] = 1.0
    # kept target logits per node
    topk_logits: Annotated[int, Field(ge=1, le=MAX_KEPT)] = 32
    # what features travel in: the target's dtype, or a byte each with a scale a layer ("float8")
    features: Literal["model", "float8"] = "model"
    # of a prompt's last tokens; the rest is counted
    max_prompt_features: Annotated[int, Field(ge=0)] = 1024
    # of captured requests, those of whose prompts anything is sent, by another hash of the request
    # id
    prompt_sample_rate: Annotated[float, Field(ge=0, le=1)] = 1.0
    # CUDA: steps on their way to the host; none free is a counted drop
    pinned_buffers: PositiveInt = 4
    # CUDA: of each buffer; a step that needs more is a counted drop
    pinned_buffer_bytes: PositiveInt = 64 << 20


class PublishConfig(Section):
    """The publisher's bounds. The oldest queued message is dropped when either is reached."""

    # of messages that wait for the trainer
    queue_bytes: PositiveInt = 256 << 20
    # of messages that wait for the trainer
    queue_messages: PositiveInt = 4096
    # after so long without a message a heartbeat carries the counters
    heartbeat_s: Annotated[float, Field(gt=0)] = 1.0


class SwapConfig(Section):
    """How new weights are noticed, and what they change for cached prefixes."""

    # false: the server keeps the draft that it was started with
    enabled: bool = True
    # how often `CURRENT` is looked at
    poll_s: Annotated[float, Field(gt=0)] = 0.25
    # gain in accept length, a factor, after which cached prefixes are computed again; 0: never
    renew_prefixes_at: Annotated[float, Field(ge=0)] = 1.1
    # those of prompts of at most so many tokens
    renew_prompt_tokens: Annotated[int, Field(ge=0)] = 2048


class SpeculationConfig(Section):
    """How many tokens are drafted at a time."""

    # false: always --speculative-num-steps, as EAGLE3 does
    adaptive: bool = True
    # of decode rounds, spent on measuring what other counts cost
    explore: Annotated[float, Field(ge=0, le=0.1)] = 0.005
    # gain in tokens a second below which no more steps are taken
    margin: Annotated[float, Field(ge=0)] = 0.02


class CanaryConfig(Section):
    """How a version that was swapped in is judged by what it accepts."""

    # false: what was published stays
    enabled: bool = True
    # probability that a version that is as good as the one before is suspected
    error_rate: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3
    # loss in accept length that is never rolled back
    margin: Annotated[float, Field(ge=0)] = 0.02
    # of the servers of a weights directory, which take a new version at once; the others wait
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
    # how long they wait for a rejection; must be less than the trainer keeps a version,
    # `trainer.publish.keep` times `every_s`
    wait_s: Annotated[float, Field(ge=0)] = 30.0

    def waits(self, server: str) -> float:
        """Seconds for which the server of that name waits with a new version."""
        first = zlib.crc32(server.encode()) < self.share * 2**32
        return 0.0 if first else self.wait_s


class AuditConfig(Section):
    """Whether finished requests are decoded again without speculation, while the server is idle."""

    # of the greedy requests; 0: none
    share: Annotated[float, Field(ge=0, le=1)] = 0.0


class PluginConfig(Section):
    capture: CaptureConfig = CaptureConfig()
    publish: PublishConfig = PublishConfig()
    swap: SwapConfig = SwapConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    canary: CanaryConfig = CanaryConfig()
    audit: AuditConfig = AuditConfig()


class ServerConfig(Section):
    """The whole file as the server reads it; the trainer's sections are the trainer's to check."""

    link: LinkConfig = LinkConfig()
    weights: WeightsConfig = WeightsConfig()
    plugin: PluginConfig = PluginConfig()
    trainer: dict[str, Any] = {}


class ConfigError(ValueError):
    """A configuration that cannot be used; the text says which file, key, what was expected."""


def load(model: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Read `path` (None: all defaults), apply `section.key=value` overrides (TOML values, or bare
    strings), check.

    Raises ConfigError.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from None
    for override in overrides:
        _apply(data, override)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})"
            for e in error.errors()
        ]
        raise ConfigError(
            "\n".join([f"{path or 'defaults'} is not a valid configuration:", *lines])
        ) from None


def load_server_config() -> ServerConfig:
    """The one place where the plugin reads the environment."""
    path = os.environ.get(ENV_CONFIG)
    return load(
        ServerConfig, Path(path) if path else None, shlex.split(os.environ.get(ENV_SET, ""))
    )


def _apply(data: dict[str, Any], override: str) -> None:
    key, eq, text = override.partition("=")
    if not eq or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, leaf = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section")
    data[leaf] = value
