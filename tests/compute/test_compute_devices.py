"""The device of a run on a cluster is that of its workers, whatever the machine that plans it has."""

import json
import os

import dask
import numpy as np
import pytest
import torch
from clusters import processes
from compute_works import Scripted
from volumes import model_file, scan_file

from pipeline.cli import main
from pipeline.compute.cluster import device_at, open_runner
from pipeline.config import WORTH_A_WORKER
from pipeline.errors import ClusterError
from pipeline.store.arrays import open_array
from pipeline.store.location import Location

# stands for a GPU: torch says on this worker that there is one
WITH_GPU = "import torch; torch.cuda.is_available = lambda: True"
# stands for one that computes: what torch is told to do there, it does on the processor; tells which one it is
AS_GPU = """
import os
import torch

with open(LOG, "a") as log:
    print(os.environ["CUDA_VISIBLE_DEVICES"], file=log)
class Devices(type):
    made = torch.device

    def __call__(cls, name):
        return cls.made("cpu" if str(name) == "cuda" else name)

    def __instancecheck__(cls, it):
        return isinstance(it, cls.made)

torch.cuda.is_available, torch.version.cuda = lambda: True, None
torch.device = Devices("device", (), {})
torch.nn.Module.to = lambda self, to=None, *, move=torch.nn.Module.to, **more: (
    move(self, **more) if to is None else move(self, "cpu" if to == "cuda" else to, **more)
)
"""
VISIBLE = "CUDA_VISIBLE_DEVICES"


def test_a_run_is_for_gpus_where_every_worker_that_gets_blocks_has_one(tmp_path, caplog):
    (tmp_path / "gpu.py").write_text(WITH_GPU)
    preloaded = ("--nthreads", "1", "--preload", str(tmp_path / "gpu.py"))
    with processes(tmp_path) as started, open_runner_of(started, "--nthreads", "1") as run:
        assert run.device() == "cpu"
        started.worker(*preloaded)
        run.client.wait_for_workers(2, timeout=60)
        assert run.device() == "cpu"
        assert "the CPU, since 1 of 2 workers have a GPU: start these with --resources GPU=1" in caplog.text
        started.worker(*preloaded, "--resources", "GPU=1")
        run.client.wait_for_workers(3, timeout=60)
        assert run.device() == device_at(started.address) == "cuda"
        started.worker("--nthreads", "1", "--resources", "GPU=1")
        run.client.wait_for_workers(4, timeout=60)
        assert run.device() == "cpu"
        assert "torch can use a GPU on 1 of the 2 workers whose resources name one" in caplog.text
        started.scheduler.kill()
        started.scheduler.wait(10)
        with pytest.raises(ClusterError, match=r"^the (Dask scheduler must live|workers must tell what they compute)"):
            run.device()


def open_runner_of(started, *options):
    started.worker(*options)
    return open_runner(cluster=started.address, n_workers=1)


def test_a_worker_without_the_device_that_is_asked_for_says_so(tmp_path, capsys):
    scan_file(tmp_path / "scan.tif", (8, 16, 16))
    model = str(model_file(tmp_path / "model.safetensors"))
    with processes(tmp_path) as started:
        started.worker("--nthreads", "1")
        about = ("--model", model, "--name", "x", "--cluster", started.address)
        assert main(["segment", str(tmp_path / "scan.tif"), *about, "--device", "cuda"]) != 0
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("haloseg: device cuda needs a GPU that torch can use, got none on ")
        assert main(["segment", str(tmp_path / "scan.tif"), *about]) == 0


def seen(run) -> list[tuple[str, int]]:
    """Return each worker's CUDA_VISIBLE_DEVICES, in the order of the workers' numbers, and its process."""
    told = run.client.run(lambda dask_worker: (dask_worker.name, os.environ.get(VISIBLE), os.getpid()))
    return [each[1:] for each in sorted(told.values())]


def test_each_process_of_this_machine_sees_its_own_gpu_alone_also_after_a_death(tmp_path, monkeypatch):
    monkeypatch.setenv(VISIBLE, "GPU-a,MIG-b/1/0,GPU-c")
    monkeypatch.setattr("pipeline.compute.local.CPU_COUNT", 3)  # so one more process, for what needs no GPU
    with open_runner(n_workers=2, gpus=("GPU-a", "MIG-b/1/0")) as run:
        before = seen(run)
        assert [gpu for gpu, _ in before] == ["GPU-a", "MIG-b/1/0", ""]
        workers = run.client.scheduler_info()["workers"].values()
        assert {each["name"]: each["resources"] for each in workers} == {0: {"GPU": 1}, 1: {"GPU": 1}, 2: {}}
        records = []
        assert run(Scripted(str(tmp_path), acts=((2, "die once"),)), range(6), on_record=records.append) == ()
        run.client.wait_for_workers(3, timeout=30)
        again = seen(run)
        assert ({*again} != {*before}, [gpu for gpu, _ in again]) == (True, ["GPU-a", "MIG-b/1/0", ""])
    assert os.environ[VISIBLE] == "GPU-a,MIG-b/1/0,GPU-c"


def test_a_run_takes_every_gpu_that_the_user_shows_and_ends_in_the_same_labels(tmp_path, capsys, monkeypatch):
    scan_file(tmp_path / "scan.tif", (24, 60, 52))
    image, model = str(tmp_path / "scan.zarr"), str(model_file(tmp_path / "model.safetensors"))
    assert main(["ingest", str(tmp_path / "scan.tif"), image, "--chunk", "16", "--shard", "16"]) == 0
    (tmp_path / "gpu.py").write_text(f"LOG = {str(tmp_path / 'seen')!r}\n{AS_GPU}")
    monkeypatch.setenv(VISIBLE, "GPU-a,GPU-b")
    monkeypatch.setattr("pipeline.compute.local.CPU_COUNT", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("this process began to use a GPU"))
    about = (image, "--model", model, "--probabilities", "--json", "--column", "1,2,2")
    capsys.readouterr()
    for gpus, worth in ((["GPU-a"], 10**14), (["GPU-a", "GPU-b"], 10**6)):  # of a small scan, and of a large one
        monkeypatch.setitem(WORTH_A_WORKER, "cuda", worth)
        assert main(["plan", *about]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert (plan["device"], plan["workers"], plan["gpus"]) == ("cuda", len(gpus), gpus)
    assert main(["segment", *about, "--name", "three", "--workers", "3"]) == 2
    assert capsys.readouterr().err.endswith("a GPU of its own, got 3 and 2 GPUs; use 2 or fewer\n")
    with dask.config.set({"distributed.worker.preload": [str(tmp_path / "gpu.py")]}):
        assert main(["segment", *about, "--name", "gpus"]) == 0
    assert "2 workers, each with a GPU: GPU-a, GPU-b" in capsys.readouterr().err
    assert set((tmp_path / "seen").read_text().split()) == {"GPU-a", "GPU-b"}
    assert main(["segment", *about, "--name", "one", "--device", "cpu", "--workers", "1"]) == 0
    several, one = (np.asarray(open_array(Location(f"{image}/probabilities/{name}/0"))) for name in ("gpus", "one"))
    assert np.abs(several - one).max() <= 1e-5
    classes = (np.asarray(open_array(Location(f"{image}/labels/{name}/0"))) for name in ("gpus", "one"))
    assert not (np.not_equal(*classes) & (np.abs(one[0] - one[1]) > 2e-5)).any()
