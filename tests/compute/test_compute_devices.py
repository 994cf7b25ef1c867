"""The device of a run on a cluster is that of its workers, whatever the machine that plans it has."""

import pytest
from clusters import processes
from volumes import model_file, scan_file

from pipeline.cli import main
from pipeline.compute.cluster import device_at, open_runner
from pipeline.errors import ClusterError

# stands for a GPU: torch says on this worker that there is one
WITH_GPU = "import torch; torch.cuda.is_available = lambda: True"


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
