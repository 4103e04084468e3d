"""What stands before SGLang's WeightUpdaters, on an updater that writes and fails as SGLang's does.

The real ones, behind a real server's API, are in tests/loop/test_operations.py; updates over CUDA
IPC are here only.
"""

from types import SimpleNamespace

import pytest

from aurora_sglang_plugin.serve.target_updates import DraftUpdater, TargetUpdater


class Updater:
    """As SGLang's: remembers the new path before it loads, and rolls back to that one."""

    def __init__(self, directories):
        # name -> weights, or an exception
        self.directories = directories
        self.model_config = SimpleNamespace(model_path="old")
        self.weights = directories["old"]

    def load(self, path):
        weights = self.directories[path]
        self.weights = "partly written"
        if isinstance(weights, Exception):
            raise weights
        self.weights = weights

    def update_weights_from_disk(
        self, model_path, load_format, weight_name_filter=None, recapture_cuda_graph=False
    ):
        self.model_config.model_path = model_path
        if model_path not in self.directories:
            return False, "Failed to get weights iterator: none."
        try:
            self.load(model_path)
        except Exception as error:
            message = f"Failed to update weights: {error}.\nRolling back to original weights."
            self.load(self.model_config.model_path)
            return False, message
        return True, "Succeeded to update model weights."

    def update_weights_from_tensor(self, named_tensors, load_format=None):
        self.weights = named_tensors
        if named_tensors is None:
            raise ValueError("nothing")
        return True, "Success"

    def begin_weight_update(self):
        if self.weights == "quantized":
            raise RuntimeError("cannot be restored")

    def update_weights_from_ipc(self, recv_req):
        return False, "IPC weight update failed"

    def init_weights_update_group(self, *args):
        return True, "joined"


@pytest.fixture
def told():
    return []


@pytest.fixture
def updater(told):
    directories = {"old": "old weights", "new": "new weights", "bad": ValueError("shapes")}
    return TargetUpdater(Updater(directories), told.append)


def test_files_say_what_the_target_is(updater, told):
    assert updater.update_weights_from_disk("new", "auto", recapture_cuda_graph=True)[0]
    assert told == ["new"] and updater.weights == "new weights"


def test_what_fails_before_it_writes_changes_nothing(updater, told):
    success, message = updater.update_weights_from_disk("nowhere", "auto")
    assert not success and "iterator" in message
    assert (
        told == [] and updater.weights == "old weights" and updater.model_config.model_path == "old"
    )


def test_what_fails_half_way_is_rolled_back_to_what_was_there(updater, told):
    """SGLang reads the bad directory again, and its exception ends the scheduler."""
    success, message = updater.update_weights_from_disk("bad", "auto")
    assert not success and "shapes" in message and "loaded old again" in message
    assert (
        told == ["old"]
        and updater.weights == "old weights"
        and updater.model_config.model_path == "old"
    )


def test_tensors_make_a_target_that_no_files_hold(updater, told):
    assert updater.update_weights_from_tensor(["t"], load_format=None) == (True, "Success")
    success, message = updater.update_weights_from_tensor(named_tensors=None)
    assert not success and "nothing" in message and "part of the update" in message
    assert not updater.update_weights_from_ipc(None)[0]
    updater.begin_weight_update()
    assert told == [None] * 4


def test_a_failure_that_has_no_answer_is_not_hidden(updater, told):
    updater._updater.weights = "quantized"
    with pytest.raises(RuntimeError):
        updater.begin_weight_update()
    assert told == [None]


def test_reading_changes_nothing(updater, told):
    assert updater.init_weights_update_group("host", 1) == (True, "joined") and told == []


def test_the_draft_stays_whatever_is_called():
    draft = DraftUpdater(lambda: 7)
    calls = (
        "begin_weight_update",
        "end_weight_update",
        "update_weights_from_ipc",
        "a_call_of_another_sglang",
    )
    for name in calls:
        success, message = getattr(draft, name)("anything", named="too")
        assert success and "version 7" in message
    draft.alone = True
    success, message = draft.load_weights_from_distributed([])
    assert not success and "selector target or all" in message and "published instead" in message
