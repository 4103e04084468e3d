"""What several test files train and serve: a tiny random target of the simulated traffic's size,
and a random draft.
"""

import pytest
from models import make_random_target
from traffic import HIDDEN, VOCAB, messages

from aurora_sglang_plugin.link.wire import decode
from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_trainer.drafts.eagle3_init import init_draft


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directory with `target` and `draft`; a file that needs others has a fixture of its own."""
    directory = tmp_path_factory.mktemp("models")
    init_draft(
        make_random_target(directory / "target", vocab=VOCAB, hidden=HIDDEN),
        directory / "draft",
        "random",
    )
    return directory


@pytest.fixture(scope="module")
def stream(models):
    target = target_fingerprint(models / "target")
    parts = messages(target=target, vocab=VOCAB, features=3 * HIDDEN, requests=60)
    return [decode(p, max_bytes=1 << 20) for p in parts]
