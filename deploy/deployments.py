"""Serves the flows of one machine as deployments: the archive by schedule, one scan, an ingest or a training on demand.

``serve.py`` starts it; what runs in a cluster is in ``prefect.yaml``.
"""

from __future__ import annotations

import argparse

from prefect import serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy

from flows.archive import segment_archive
from flows.ingest import ingest_scan
from flows.segment import segment_scan
from flows.train import train_model


def main() -> None:
    """Serve until a signal ends this process; flow runs are processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("archive", "model", "name", "cluster"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--truth")
    parser.add_argument("--ignore", type=int)
    parser.add_argument("--every", type=float)
    parser.add_argument("--cron")
    parser.add_argument("--settle", type=float, required=True)
    args = parser.parse_args()
    alone = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    serve(
        segment_archive.to_deployment(
            "archive", interval=args.every, cron=args.cron, concurrency_limit=alone, tags=["archive"],
            parameters={
                "archive": args.archive, "model": args.model, "name": args.name, "truth": args.truth,
                "ignore": args.ignore, "cluster": args.cluster, "settle_s": args.settle,
            },
            description="Segments every scan of the archive that is not done yet.",
        ),
        segment_scan.to_deployment(
            "scan", parameters={"model": args.model, "name": args.name, "cluster": args.cluster}, tags=["scan"],
            description="Segments one scan: give scan and image.",
        ),
        ingest_scan.to_deployment("ingest", tags=["scan"], description="Makes an image of one scan: give both paths."),
        train_model.to_deployment(
            "train", concurrency_limit=1, tags=["train"], description="Trains a model on labelled images."
        ),
        pause_on_shutdown=False, print_starting_message=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
