"""Everything on one machine, from nothing: Prefect server, Dask scheduler, workers, and the deployments of the flows.

    python deploy/serve.py [--archive FOLDER] [--model FILE] [--every SECONDS | --cron "0 20 * * *"] [--workers N]

It watches over its processes: one that dies is started again. Ctrl-C ends all of them; runs go on at the next start.
State (Prefect's database, logs) lies in --home, images and labels beside the scans.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "pipeline" / "demo"
_PR_SET_PDEATHSIG = 1
_START_TIMEOUT_S = 300.0
_QUICK_S = 5.0
_HOSTS_PER_GPU = 4  # workers without one that copy scans and make pyramids, while the GPU computes
_STOP_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Service:
    """A process that is to run for as long as this one does."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    n_quick: int = field(default=0)

    def start(self) -> None:
        """Start it, in a group of its own; the kernel ends it if this process is killed."""
        self.started_s = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip

    def keep(self) -> None:
        """Start it again if it has died; ever more slowly if it dies at once each time."""
        if self.process is None or self.process.poll() is None:
            return
        lived_s = time.monotonic() - self.started_s
        self.n_quick = self.n_quick + 1 if lived_s < _QUICK_S else 0
        tell(f"{self.name} ended with code {self.process.returncode}, see {self.log}; starting it again")
        time.sleep(min(30.0, self.n_quick * 2.0))
        self.start()

    def stop(self) -> None:
        """End it and its children: politely, then by force."""
        if self.process is None:
            return
        _signal(self.process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_TIMEOUT_S)
        _signal(self.process, signal.SIGKILL)
        self.process.wait()


def main() -> int:
    """Start all, and watch over them until Ctrl-C."""
    args = _arguments()
    home = Path(args.home).resolve()
    archive = Path(args.archive).resolve() if args.archive else home / "archive"
    if not Path(args.model).is_file():
        sys.stderr.write(f"haloseg: a model must be a file, got {args.model}; give --model FILE.safetensors\n")
        return 2
    for folder in (home / "prefect", home / "logs", archive):
        folder.mkdir(parents=True, exist_ok=True)
    for port, what in ((args.port, "--port"), (args.dask_port, "--dask-port"), (args.dask_port + 1, "--dask-port")):
        if _is_taken(port):
            sys.stderr.write(f"haloseg: port {port} must be free, got one in use; end what uses it or give {what}\n")
            return 2
    for number in (signal.SIGTERM, signal.SIGINT):  # also where a shell started this in the background, without Ctrl-C
        signal.signal(number, lambda *_: sys.exit(0))
    services: list[Service] = []
    code = 0
    try:
        _run(args, home, archive, services)
    except SystemExit as over:
        code = int(over.code or 0)
        tell("stopping")
    finally:
        for service in reversed(services):
            service.stop()
    return code


def _run(args: argparse.Namespace, home: Path, archive: Path, services: list[Service]) -> None:
    """Start the processes in the order in which they need each other."""
    api, address = f"http://127.0.0.1:{args.port}/api", f"tcp://127.0.0.1:{args.dask_port}"
    base = os.environ | {
        "PREFECT_HOME": str(home / "prefect"), "PREFECT_API_URL": api, "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1", "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # on disk, so that a server that is started again still knows who holds which slot
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "100",
        "DASK_DISTRIBUTED__WORKER__PRELOAD": '["pipeline.compute.metrics"]',
        "HALOSEG_CLUSTERS": os.environ.get("HALOSEG_CLUSTERS", address),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
    }  # fmt: skip
    if args.database:
        base["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = args.database

    def add(name: str, *command: str, **environment: str) -> None:
        service = Service(name, [*command], base | environment, home / "logs" / f"{name}.log")
        service.start()
        services.append(service)

    program = str(Path(sys.executable).parent / "prefect")
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    add("prefect-server", program, "server", "start", "--host", "127.0.0.1", "--port", str(args.port))
    add("dask-scheduler", *dask, "--host", "127.0.0.1", "--port", str(args.dask_port),
        "--dashboard-address", f"127.0.0.1:{args.dask_port + 1}")  # fmt: skip
    gpus = _gpus()
    n_workers = len(gpus) or args.workers
    n_hosts = min(_HOSTS_PER_GPU * len(gpus), max(0, (os.cpu_count() or 1) - len(gpus)))
    n_threads = max(1, (os.cpu_count() or 1) // (n_workers + n_hosts))
    for number in range(n_workers + n_hosts):
        own = {name: str(n_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        has_gpu = number < len(gpus)
        own |= {"CUDA_VISIBLE_DEVICES": gpus[number] if has_gpu else ""} if gpus else {}
        add(f"dask-worker-{number}", sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1",
            "--memory-limit", "0", "--dashboard-address", f"127.0.0.1:{args.dask_port + 2 + number}",
            "--local-directory", str(home / "dask"), *(["--resources", "GPU=1"] if has_gpu else []), **own)  # fmt: skip
    _wait_for(f"{api}/health", services)
    for what in ("automations", "limits"):
        made = subprocess.run([sys.executable, str(ROOT / "deploy" / f"{what}.py")], env=base, capture_output=True,
                              text=True, check=False)  # fmt: skip
        if made.returncode:
            tell(f"{what} were not made: {made.stderr.strip().splitlines()[-1:]}")
    add("deployments", sys.executable, str(ROOT / "deploy" / "deployments.py"), "--archive", str(archive), "--model",
        str(Path(args.model).resolve()), "--name", args.name, "--cluster", address, "--settle", str(args.settle),
        *(["--every", str(args.every)] if not args.cron else ["--cron", args.cron]),
        *(["--truth", args.truth] if args.truth else []),
        *(["--ignore", str(args.ignore)] if args.ignore is not None else []))  # fmt: skip
    tell(f"Prefect UI     http://127.0.0.1:{args.port}")
    tell(f"Dask           http://127.0.0.1:{args.dask_port + 1}/metrics, {n_workers} workers at {address}"
         + (f", and {n_hosts} without a GPU that copy" if n_hosts else ""))
    tell(f"archive        {archive}: put scans there; labels '{args.name}' appear in SCAN.zarr beside them")
    tell(f"logs           {home / 'logs'}")
    tell("Ctrl-C ends all; the next start goes on")
    while True:
        time.sleep(1.0)
        for service in services:
            service.keep()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", help="folder of scans (default HOME/archive)")
    parser.add_argument("--model", default=str(DEMO / "model.safetensors"), help="model file (default: the demo's)")
    parser.add_argument("--name", default="classes", help="the label volume of each image (default classes)")
    parser.add_argument("--truth", help='where truths lie: "{stem}-truth.tif"')
    parser.add_argument("--ignore", type=int, help="value of the truths where nobody has labelled (default: none)")
    parser.add_argument("--every", type=float, default=300.0, help="seconds between looks at the archive (default 300)")
    parser.add_argument("--cron", help='look at the archive by a cron line instead, such as "0 20 * * *"')
    parser.add_argument("--settle", type=float, default=60.0, help="a scan changed less long ago is still being copied")
    parser.add_argument("--workers", type=int, default=2, help="Dask workers where there is no GPU (default 2)")
    parser.add_argument("--home", default="build/serve", help="where state lies (default build/serve)")
    parser.add_argument("--port", type=int, default=4200, help="of the Prefect server (default 4200)")
    parser.add_argument("--dask-port", type=int, default=8786, help="of the scheduler; the next ones are its pages'")
    parser.add_argument("--database", help="of the Prefect server, postgresql+asyncpg://...; default SQLite")
    return parser.parse_args()


def _gpus() -> list[str]:
    """Return the names of the GPUs that torch can use here; of those in CUDA_VISIBLE_DEVICES, where that is set."""
    ask = "from pipeline.unet.device import visible_gpus; print(*visible_gpus())"
    told = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=False)
    if told.returncode:
        tell(f"GPUs were not counted: {told.stderr.strip().splitlines()[-1:]}")
    return told.stdout.split()


def _wait_for(url: str, services: list[Service]) -> None:
    """Wait until the server answers."""
    end_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < end_s:
        for service in services:
            service.keep()
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    sys.stderr.write(f"haloseg: the Prefect server must answer at {url} within {_START_TIMEOUT_S:g} s, got silence; "
                     f"see {services[0].log}\n")  # fmt: skip
    raise SystemExit(1)


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _end_with_parent() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL("libc.so.6").prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def tell(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
