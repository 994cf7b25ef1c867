import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from volumes import model_file, scan_file

from pipeline.cli import main
from pipeline.ingest import ingest, ingest_labels
from pipeline.unet.settings import Head, UNetSettings

pytestmark = pytest.mark.usefixtures("one_thread")

README = Path(__file__).parent.parent / "README.md"
COMMAND = ".venv/bin/haloseg"
QUICKLY = {"train": ["--minutes", "0.02"]}
LEAST_DICE = {"boundary": 0.75, "interior": 0.92}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return what runs haloseg in this test's folder and returns its document."""
    monkeypatch.chdir(tmp_path)

    def run(arguments):
        code, printed = main([*arguments, "--json"]), capsys.readouterr()
        assert code == 0, printed.err
        return json.loads(printed.out)

    return run


def demo(folder):
    """Run the demo as a user does, with a Prefect home of its own; return its document."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "demo", "demo", "--json"], check=False, cwd=folder, capture_output=True,
        text=True, env=os.environ | {"PREFECT_HOME": str(folder / "prefect")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_command_of_the_readme_runs_in_its_order(tmp_path, run):
    lines = [line.strip() for line in README.read_text().splitlines() if line.strip().startswith(f"{COMMAND} ")]
    assert len(lines) >= 8
    voxels = scan_file(tmp_path / "scan.tif", (4, 160, 150))
    tifffile.imwrite(tmp_path / "truth.tif", (voxels > 128).astype(np.uint8) * 255, photometric="minisblack")
    (tmp_path / "quick.toml").write_text("steps = 60\nvalidate_every = 30\npatch = 64\nbatch = 4\n")
    quick = [line.replace("--minutes 30", "--minutes 30 --recipe quick.toml") for line in lines]
    documents = [run(shlex.split(line)[1:]) for line in quick]
    assert documents[-3]["mean_dice"] > 0.5
    assert documents[-2]["instances"] > 0
    assert documents[-1]["labels"] == ["cells", "nuclei", "truth"]


def test_the_other_commands_of_the_readme_run_on_what_they_name(tmp_path, run):
    lines = [shlex.split(line) for line in README.read_text().splitlines() if line.startswith("    haloseg ")]
    assert [line[1] for line in lines] == ["train", "train", "import"]
    for name in ("scan", "more"):
        voxels = scan_file(tmp_path / f"{name}.tif", (2, 96, 90))
        ingest(str(tmp_path / f"{name}.tif"), str(tmp_path / f"{name}.zarr"))
        tifffile.imwrite(tmp_path / "truth.tif", (voxels > 128).astype(np.uint8) * 255, photometric="minisblack")
        ingest_labels(str(tmp_path / "truth.tif"), image=str(tmp_path / f"{name}.zarr"), name="truth")
    (tmp_path / "my.toml").write_text("patch = 64\n")
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3, padding=1), torch.nn.Softmax(dim=1)).eval()
    torch.export.save(torch.export.export(network, (torch.randn(1, 1, 128, 128),)), tmp_path / "network.pt2")
    learnt, _, imported = (run([*verb, *QUICKLY.get(verb[0], [])]) for _, *verb in lines)
    assert learnt["model"] == "models/cells/1.safetensors"
    assert imported["classes"] == ["background", "wall", "cell"]
    assert imagecodecs.imread(tmp_path / "patches.png").ndim == 3
    for name, model in (("by-path", "cells.safetensors"), ("by-name", "cells")):
        assert run(["segment", "scan.zarr", "--model", model, "--name", name])["voxels"] == 2 * 96 * 90


def test_the_commands_in_the_readmes_sentences_run_on_what_they_name(tmp_path, run):
    text = " ".join(README.read_text().split())
    verbs = r"`(?:haloseg )?((?:ensemble|train|segment|evaluate|export|import) [^`]+)`"
    lines = [line for line in map(shlex.split, re.findall(verbs, text)) if "..." not in line]
    named = [line for line in lines if not line[1].startswith(("--", "smp:"))]
    verbs = ["ensemble", "evaluate", "evaluate", "train", "segment", "evaluate", "export", "import"]
    assert [line[0] for line in named] == verbs
    for name, seed in (("noisy", 0), ("clean", 1), ("scan", 2)):
        scan_file(tmp_path / f"{name}.tif", (2, 96, 90), seed=seed)
        ingest(str(tmp_path / f"{name}.tif"), str(tmp_path / f"{name}.zarr"))
    truth = np.resize(np.array([0, 1, 255], np.uint8), (2, 96, 90))
    tifffile.imwrite(tmp_path / "truth.tif", truth, photometric="minisblack")
    ingest_labels(str(tmp_path / "truth.tif"), image=str(tmp_path / "scan.zarr"), name="cells")
    settings = UNetSettings(dims=2, width=2, depth=1, head=Head.SIGMOID)
    model = model_file(tmp_path / "parts.safetensors", settings, classes=("none", "cells", "nuclei"))
    run(["segment", str(tmp_path / "scan.zarr"), "--model", model, "--name", "parts", "--probabilities"])
    for name in ("cells", "nuclei"):
        tifffile.imwrite(tmp_path / f"{name}.tif", truth, photometric="minisblack")
    for seed, name in enumerate(("cells", "a", "b")):
        model_file(tmp_path / f"{name}.safetensors", seed=seed)
    done = [run([*line, *QUICKLY.get(line[0], [])]) for line in named[:-1]]
    together, sparse, overlapping, _, written, compared, packed = done
    assert (tmp_path / "noisy.zarr" / "predictions" / "clean").samefile(written["prediction"])
    assert (together["networks"], together["model"]) == (2, "all.safetensors")
    assert sparse["voxels"] == 2 * sparse["voxels_ignored"] == 2 * 96 * 90 * 2 // 3
    assert [(each["label"], each["voxels"]) for each in overlapping["labels"]] == [
        ("cells", truth.size), ("nuclei", truth.size)
    ]  # fmt: skip
    assert compared["rmse"] >= compared["mae"] > 0
    (tmp_path / packed["package"]).rename(tmp_path / named[-1][1])
    assert run(named[-1])["network"]["source"] == "bioimage.io package haloseg cells"


def test_the_demo_segments_as_a_network_that_has_learned(tmp_path):
    document = demo(tmp_path)
    dice = {each["class"]: each["dice"] for each in document["classes"]}
    assert document["blocks_run"] == document["blocks"] == 18
    assert all(dice[name] >= least for name, least in LEAST_DICE.items()), dice
    assert imagecodecs.imread(tmp_path / "demo" / "picture.png").shape[2] == 3
    again = demo(tmp_path)
    assert (again["blocks_run"], again["classes"]) == (0, document["classes"])
