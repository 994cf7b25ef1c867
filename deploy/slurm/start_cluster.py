"""Keep a Dask cluster of Slurm jobs up, as many as there is work for: run it where sbatch works, and leave it running.

    python deploy/slurm/start_cluster.py --maximum 16

What the jobs are like is in dask.yaml. Flow runs then use its address as their cluster.
"""

import argparse
import signal
import sys
from threading import Event

from dask_jobqueue import SLURMCluster
from distributed import Security


def main() -> None:
    """Start the scheduler here and adapt the number of jobs until SIGTERM or Ctrl-C, which end the jobs too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8786)
    parser.add_argument("--minimum", type=int, default=1, help="a run asks for one worker within 30 seconds")
    parser.add_argument("--maximum", type=int, default=8)
    options = parser.parse_args()
    over = Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: over.set())
    scheduler = {"port": options.port, "dashboard_address": ":8787"}
    with SLURMCluster(security=Security(), protocol="tls://", scheduler_options=scheduler) as cluster:
        cluster.adapt(minimum_jobs=options.minimum, maximum_jobs=options.maximum)
        sys.stdout.write(f"{cluster.scheduler_address}\n")
        sys.stdout.flush()
        over.wait()


if __name__ == "__main__":
    main()
