"""`aurora-trainer keygen`: make the link's keys, and say what to do with them.

No secret is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aurora_sglang_plugin.link.keys import SERVERS, TRAINER, make_keys


def keygen(directory: Path, servers: Sequence[str]) -> str:
    """Make what is not there (keys.make_keys, also for errors) and return the instructions."""
    directory = directory.absolute()
    new = make_keys(directory, servers)
    trainer = directory / TRAINER
    lines = [
        (
            f"keys written directory={directory} trainer={'new' if new else 'kept'}"
            f" servers={','.join(servers)}"
        ),
        "",
    ]
    lines += [
        "Put this into the configuration of the trainer and of its servers:",
        "",
        "[link]",
        'endpoint = "tcp://TRAINER:5590"   # the trainer\'s address, as servers see it',
        (
            '# bind = "tcp://0.0.0.0:5590"     # where the trainer binds, if it cannot bind that'
            " address"
        ),
        f'trainer_keys = "{trainer}"',
        f'server_keys = "{directory / servers[0]}"',
        *(f'# server_keys = "{directory / name}"   # instead, for {name}' for name in servers[1:]),
        "",
        (
            f"{trainer} stays on the trainer's machine, readable by its user alone. Each other"
            " directory belongs to one"
        ),
        (
            "server: copy it to the same place on that machine (scp -rp keeps its modes), and"
            " remove it here."
        ),
    ]
    if not new:
        lines.append("Restart the trainer: it reads its list of servers when it starts.")
    lines.append(
        f"Who is removed from {trainer / SERVERS} is refused after the trainer's next start."
    )
    return "\n".join(lines)
