"""What the servers of one trainer, and of one weights directory, cost together: connections,
buffers, files opened and read. docs/scale.md is the page; `aurora-trainer plan` prints it.

Each value is one formula; tests/trainer/tools/test_fleet.py holds them against real publishers, a
receiver and a watcher.
"""

from __future__ import annotations

from aurora_sglang_plugin.link.ledger import MAX_SESSIONS
from aurora_sglang_plugin.link.receiver import RECEIVE_QUEUE_MESSAGES
from aurora_trainer.config import TrainerFile
from aurora_trainer.tools.sizes import Load

# CURRENT and REJECTED, by each rank (watcher.py)
FILES_PER_POLL = 2
# the ledger knows ended sessions too: of servers that were restarted since
SESSIONS_PER_SERVER = 2


def fleet(config: TrainerFile, load: Load, message_bytes: float, version_bytes: int) -> dict:
    """By `load.servers` servers of `load.tp` ranks.

    message_bytes: of a verify step. version_bytes: of the file of a version.
    """
    plugin, every_s = config.plugin, config.trainer.publish.every_s
    # ranks of one machine share what the machine read
    read = load.servers * version_bytes
    # of a new version: those of the canary, or all
    first = plugin.canary.share if plugin.canary.enabled else 1.0
    most = MAX_SESSIONS // SESSIONS_PER_SERVER
    captured = load.servers * load.tokens_per_s * plugin.capture.sample_rate
    return {
        "gpus": load.servers * load.tp,
        "trainers_at_least": -(-load.servers // most),
        "trainer_connections": load.servers,
        # that wait in the trainer's sockets while it does not keep up
        "trainer_socket_bytes": load.servers * RECEIVE_QUEUE_MESSAGES * message_bytes,
        "heartbeats_per_s": load.servers / plugin.publish.heartbeat_s,
        "captured_tokens_per_s": captured,
        "files_opened_per_s": FILES_PER_POLL * load.servers * load.tp / plugin.swap.poll_s,
        "read_bytes_per_version": read,
        "read_bytes_at_once": first * read,
        "read_bytes_per_s": read / every_s if every_s else 0.0,
        # with a pair for each server; one for all does, the trainer does not tell them apart
        "key_files": load.servers,
    }
