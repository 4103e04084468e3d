"""Whose a sample is: its domain's (the label of its request), and within that its server's.

Buffer and gate share what they have among owners, so that nobody's flood is all of it. A client may
choose any label, so only so many are told apart; all others are one owner together.
"""

from __future__ import annotations

from collections.abc import Collection

# domains, and servers of one domain; all beyond them are REST
MAX_OWNERS, REST = 16, "(rest)"

# domain, server (session)
Owner = tuple[str, str]


def owner_of(domain: str, server: str, known: Collection[Owner]) -> Owner:
    """The owner of what came under that label from that server, beside those that are `known`.
    What has no label is never part of REST."""
    domains = {other for other, _ in known} - {REST}
    if domain and domain not in domains and len(domains) >= MAX_OWNERS:
        domain = REST
    servers = {other for of, other in known if of == domain} - {REST}
    if server not in servers and len(servers) >= MAX_OWNERS:
        server = REST
    return domain, server
