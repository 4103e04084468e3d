"""When in SGLang's round Aurora's work is done."""

import json
import subprocess
import sys
from pathlib import Path

ROUNDS = Path(__file__).parents[1] / "support/worker_round.py"


def test_lengths_are_published_before_the_swap():
    """The scheduler prepares the next step with them: nothing of Aurora's makes it wait."""
    out = subprocess.run([sys.executable, ROUNDS], capture_output=True, text=True, timeout=120)
    assert not out.returncode, out.stderr[-2000:]
    first, second, unpublished, idle = json.loads(out.stdout.splitlines()[-1])
    before, ours = ["begin", "before_verify", "verify"], ["verified", "step", "swap", "capture"]
    assert first == second == [*before, "publish", *ours, "draft-extend"]
    # a scheduler that does not overlap publishes nothing
    assert unpublished == [*before, *ours, "draft-extend"]
    # every rank counts every step
    assert idle == ["verify", "publish", "step", "swap", "draft-extend"]
