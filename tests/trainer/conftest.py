"""What several test files train and serve: a tiny random target of the simulated traffic's size,
and a random draft.
"""

import pytest
from models import make_random_target
from traffic import HIDDEN, VOCAB

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
