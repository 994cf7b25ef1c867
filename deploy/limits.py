"""Make the global concurrency limit of a Prefect server, by which scans share the GPUs; one that is there stays.

The command line may say how many scans compute at once, over all archives.
"""

from __future__ import annotations

import sys

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.exceptions import ObjectNotFound

from flows.slots import GPU_LIMIT

_SCANS = 2  # one computes while the next one is made ready, so that no GPU waits between scans


def main() -> None:
    """Make the limit where there is none: its number is the operator's, in the UI."""
    n_scans = int(sys.argv[1]) if len(sys.argv) > 1 else _SCANS
    with get_client(sync_client=True) as client:
        try:
            there = client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        except ObjectNotFound:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=n_scans))
            sys.stdout.write(f"limit {GPU_LIMIT} made: {n_scans}\n")
        else:
            sys.stdout.write(f"limit {GPU_LIMIT} kept: {there.limit}\n")


if __name__ == "__main__":
    main()
