"""When a job is due: every so many seconds or steps."""

from __future__ import annotations


class Schedule:
    """Due every so many seconds or steps, whichever comes first; 0 switches one off."""

    def __init__(self, every_s: float, every_steps: int):
        self.every_s, self.every_steps = every_s, every_steps
        # seconds, step: when it was due last
        self.last = (0.0, 0)

    def restart(self, now_s: float, step: int) -> None:
        self.last = (now_s, step)

    def due(self, now_s: float, step: int) -> bool:
        by_time = self.every_s and now_s - self.last[0] >= self.every_s
        by_steps = self.every_steps and step - self.last[1] >= self.every_steps
        if by_time or by_steps:
            self.restart(now_s, step)
        return bool(by_time or by_steps)
