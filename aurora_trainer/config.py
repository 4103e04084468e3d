"""The whole configuration as the trainer reads it: the server's sections and, checked, its own
under [trainer].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from aurora_sglang_plugin.config import LinkConfig, PluginConfig, Section, WeightsConfig, load
from aurora_sglang_plugin.link.receiver import ReceiveConfig
from aurora_sglang_plugin.weights.writer import PublishConfig
from aurora_trainer.checkpoint import CheckpointConfig
from aurora_trainer.drafts.batch import BatchConfig
from aurora_trainer.intake.assemble import AssembleConfig
from aurora_trainer.intake.buffer import BufferConfig
from aurora_trainer.learn.drift import DriftConfig
from aurora_trainer.learn.gate import GateConfig
from aurora_trainer.learn.objective import LossConfig
from aurora_trainer.learn.optimizer import OptimizerConfig
from aurora_trainer.metrics import MetricsConfig
from aurora_trainer.ranks import RanksConfig
from aurora_trainer.recordings.recording import RecordConfig


class ModelConfig(Section):
    """What is trained, for what, and where."""

    # directory of the target model, or its name in the local Hugging Face cache
    target: str
    # the initial draft, the same that the server starts with; absent, if the server starts without
    # one: the trainer makes it, beside its checkpoints
    draft: Path | None = None
    # `cpu` or `cuda`
    device: Literal["cpu", "cuda"] = "cpu"
    # `float32` or `bfloat16`, that the draft computes in; auto: float32 on `cpu`, bfloat16 on
    # `cuda`; masters and moments are float32 always
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def compute_dtype(self) -> Literal["float32", "bfloat16"]:
        """What "auto" stands for: float32 on the CPU, bfloat16 on CUDA."""
        if self.dtype == "auto":
            return "bfloat16" if self.device == "cuda" else "float32"
        return self.dtype


class PaceConfig(Section):
    """How much is trained for how much comes in, and how far the trainer steps back behind
    serving.
    """

    # false: receive and count only
    enabled: bool = True
    # positions with a target that must come in for each optimizer step
    new_positions_per_step: PositiveInt = 512
    # of torch on the CPU
    threads: PositiveInt = 1
    # of this process, so that serving goes first
    nice: Annotated[int, Field(ge=0, le=19)] = 10
    # of everything random in training
    seed: int = 0


class TrainerConfig(Section):
    """[trainer.*], in the order of the data's path."""

    model: ModelConfig
    pace: PaceConfig = PaceConfig()
    ranks: RanksConfig = RanksConfig()
    receive: ReceiveConfig = ReceiveConfig()
    record: RecordConfig = RecordConfig()
    assemble: AssembleConfig = AssembleConfig()
    buffer: BufferConfig = BufferConfig()
    batch: BatchConfig = BatchConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    gate: GateConfig = GateConfig()
    drift: DriftConfig = DriftConfig()
    publish: PublishConfig = PublishConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()


class TrainerFile(Section):
    """The same file as `aurora_sglang_plugin.config.ServerConfig`, with the trainer's sections
    checked.
    """

    link: LinkConfig = LinkConfig()
    weights: WeightsConfig = WeightsConfig()
    plugin: PluginConfig = PluginConfig()
    trainer: TrainerConfig


def load_trainer_config(path: Path | None, overrides: Sequence[str] = ()) -> TrainerFile:
    """Read and check the file and `section.key=value` overrides. Raises ConfigError."""
    return load(TrainerFile, path, overrides)
