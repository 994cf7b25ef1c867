"""Address: which clusters a run may be sent to, when whoever runs the service says so.

A run sends its work to the scheduler whose address it is given, by pickle and with the service's certificate. Flows
take that address from anybody who can start one. With HALOSEG_CLUSTERS set, a comma-separated list, it must be one of
these, letter by letter; "local", processes of the machine that the flow runs on, must be listed too.
"""

from __future__ import annotations

import os
import re

from pipeline.errors import ArgumentError

VARIABLE = "HALOSEG_CLUSTERS"
_ADDRESS = re.compile(r"(tcp|tls)://(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):\d{1,5}")


def check_address(cluster: str) -> None:
    """Refuse what is neither "local" nor the address of a scheduler."""
    if cluster != "local" and not _ADDRESS.fullmatch(cluster):
        raise ArgumentError(
            f'cluster must be "local", tcp://host:port or tls://host:port, got "{cluster}"; '
            "use the address that the scheduler prints"
        )


def check_cluster(cluster: str) -> None:
    """Refuse clusters outside those that the service is for; nothing is sent to find out.

    Raises
    ------
    ArgumentError : it is no address, or none of those.
    """
    check_address(cluster)
    ours = [each.strip() for each in os.environ.get(VARIABLE, "").split(",") if each.strip()]
    if ours and cluster not in ours:
        raise ArgumentError(f'cluster must be in {VARIABLE} ({", ".join(ours)}), got "{cluster}"; take one of these')
