"""Of a sample, what the gate's book-keeping reads."""

from types import SimpleNamespace


def held_sample(
    request: str, positions: int = 10, session: str = "e", domain: str = "", reason: str = "stop"
) -> SimpleNamespace:
    return SimpleNamespace(
        session=session, request=request, features=range(positions), domain=domain, reason=reason
    )
