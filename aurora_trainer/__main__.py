"""`python -m aurora_trainer` is `aurora-trainer`, if scripts are not on the path."""

from aurora_trainer.cli import app

app(prog_name="aurora-trainer")
