import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from volumes import scan_file

README = Path(__file__).parent.parent / "README.md"
COMMAND = ".venv/bin/haloseg"
LEAST_DICE = {"boundary": 0.75, "interior": 0.92}


def run(arguments, folder):
    """Run haloseg in a folder, with a Prefect home of its own; return its document."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments, "--json"], check=False, cwd=folder, capture_output=True,
        text=True, env=os.environ | {"PREFECT_HOME": str(folder / "prefect")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_command_of_the_readme_runs_in_its_order(tmp_path):
    lines = [line.strip() for line in README.read_text().splitlines() if line.strip().startswith(f"{COMMAND} ")]
    assert len(lines) >= 8
    voxels = scan_file(tmp_path / "scan.tif", (4, 160, 150))
    tifffile.imwrite(tmp_path / "truth.tif", (voxels > 128).astype(np.uint8) * 255, photometric="minisblack")
    (tmp_path / "quick.toml").write_text("steps = 60\nvalidate_every = 30\npatch = 64\nbatch = 4\n")
    quick = [line.replace("--minutes 30", "--minutes 30 --recipe quick.toml") for line in lines]
    documents = [run(shlex.split(line)[1:], tmp_path) for line in quick]
    assert documents[-2]["mean_dice"] > 0.5
    assert documents[-1]["labels"] == ["cells", "truth"]


def test_the_demo_segments_as_a_network_that_has_learned(tmp_path):
    document = run(["demo", "demo"], tmp_path)
    dice = {each["class"]: each["dice"] for each in document["classes"]}
    assert document["blocks_run"] == document["blocks"] == 18
    assert all(dice[name] >= least for name, least in LEAST_DICE.items()), dice
    assert imagecodecs.imread(tmp_path / "demo" / "picture.png").shape[2] == 3
    again = run(["demo", "demo"], tmp_path)
    assert (again["blocks_run"], again["classes"]) == (0, document["classes"])
