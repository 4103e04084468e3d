"""`make test` runs two test processes side by side.

The loop's tests share their servers and stay in one of the two; every other file stays whole. What
takes longest begins first.

Hypothesis draws the same examples in every run, so that a commit passes or fails for what it
changed; `make test ARGS="--hypothesis-profile=default"` draws new ones.
"""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("same examples", derandomize=True)
settings.load_profile("same examples")
TESTS = Path(__file__).parent
LONGEST_FIRST = ("loop", "test_demo.py", "test_demo_real.py", "kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def order(item: pytest.Item) -> int:
        first = item.path.relative_to(TESTS).parts[0]
        return LONGEST_FIRST.index(first) if first in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return "tests/loop" if path.startswith("tests/loop/") else path

    return ByFile(config, log)
