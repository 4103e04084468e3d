"""A training of the small random draft, without sockets."""

from traffic import VOCAB

from aurora_trainer.config import load_trainer_config
from aurora_trainer.learn.trainer import Training


def open_training(models, site, dtype: str, *overrides: str) -> Training:
    settings = {
        "weights.directory": site / "weights",
        "trainer.model.target": models / "target",
        "trainer.model.draft": models / "draft",
        "trainer.model.dtype": dtype,
        "trainer.pace.new_positions_per_step": 20,
        "trainer.batch.max_positions": 256,
        "trainer.optimizer.lr": 4e-3,
        "trainer.assemble.eos_token_ids": [VOCAB - 1],
        "trainer.gate.enabled": False,
    }
    return Training(
        load_trainer_config(None, [*(f"{k}={v}" for k, v in settings.items()), *overrides])
    )


def train(training: Training, stream, steps: int, replayed: int = 0) -> list[float]:
    """Train until `steps` steps were taken, the first `replayed` only drawn; each step's loss."""
    losses, step = [], training.optimizer.step
    training.optimizer.step = lambda loss: losses.append(float(loss.detach())) or step(loss)
    for number, message in enumerate(stream):
        training.feed(message, number)
        while training.due() and training.steps < steps:
            training.step(replay=training.steps < replayed)
    assert training.steps == steps
    del training.optimizer.step
    return losses
