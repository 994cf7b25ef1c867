"""Evaluation of whole volumes against scikit-learn's figures, and against formulas in plain numpy."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, jaccard_score
from volumes import model_file, scan_file

from pipeline.cli import main
from pipeline.compute.runner import run_serial
from pipeline.evaluate import evaluate
from pipeline.ingest import ingest
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.unet.settings import Padding, UNetSettings

SHAPE = (3, 40, 30)
CLASSES = (3, 9, 200)
IGNORE = 255


@pytest.fixture
def blocks(monkeypatch):
    """Have volumes be compared by many blocks."""
    for name in ("evaluate", "compare"):
        monkeypatch.setattr(f"pipeline.{name}._BLOCK", {2: (16, 16), 3: (2, 16, 16)})


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """Return the path of labels that a model made, and the labels."""
    folder = tmp_path_factory.mktemp("labels")
    scan_file(folder / "scan.tif", SHAPE)
    image = str(ingest(str(folder / "scan.tif"), str(folder / "scan.zarr")).location)
    settings = UNetSettings(dims=2, width=4, depth=1, n_classes=3, padding=Padding.SAME)
    model = model_file(folder / "m.safetensors", settings, class_values=CLASSES)
    made = segment(plan_segment(image, model=model, name="x"), run=run_serial)
    return str(made.result.location), np.asarray(made.labels.array[:])


def sparse_truth(classes, *, values, seed=0):
    """Return a truth of which a tenth is right, a tenth is not, and all else IGNORE: one row of blocks altogether."""
    rng = np.random.default_rng(seed)
    truth = np.full(classes.shape, IGNORE, np.uint8)
    drawn = rng.random(classes.shape)
    truth[drawn < 0.2] = np.array(values, np.uint8)[rng.integers(0, len(values), int((drawn < 0.2).sum()))]
    truth[drawn < 0.1] = np.array(values, np.uint8)[classes][drawn < 0.1]
    truth[:, :16] = IGNORE
    return truth


def told(capsys, *arguments):
    code = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return (json.loads(out) if code == 0 else None), [line for line in err.splitlines() if line.startswith("haloseg:")]


@pytest.mark.parametrize("values", [CLASSES, (0, 1, 2)], ids=["of the model", "indices"])
def test_voxels_that_nobody_has_labelled_do_not_count(blocks, labels, tmp_path, values):
    path, classes = labels
    truth = sparse_truth(classes, values=values)
    np.save(tmp_path / "truth.npy", truth)
    made = evaluate(path, str(tmp_path / "truth.npy"), ignore=IGNORE)
    known = truth != IGNORE
    about = np.array(values)[classes][known], truth[known]
    assert (made.n_voxels, made.n_ignored) == (known.sum(), (~known).sum())
    assert made.values == values
    each = made.figures.classes
    assert [one.dice for one in each] == pytest.approx(f1_score(*about[::-1], labels=values, average=None))
    assert [one.jaccard for one in each] == pytest.approx(jaccard_score(*about[::-1], labels=values, average=None))
    assert made.figures.accuracy == pytest.approx(accuracy_score(*about[::-1]))


def test_of_scans_only_what_counts_has_classes(blocks, tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, IGNORE], (50, 40)).astype(np.uint8)
    predicted = np.where(truth == IGNORE, 7, rng.integers(0, 2, truth.shape)).astype(np.uint16)
    for name, array in (("truth", truth), ("predicted", predicted)):
        np.save(tmp_path / f"{name}.npy", array)
    made = evaluate(str(tmp_path / "predicted.npy"), str(tmp_path / "truth.npy"), ignore=IGNORE)
    known = truth != IGNORE
    assert made.values == (0, 1)
    assert made.figures.accuracy == pytest.approx((truth == predicted)[known].mean())


def test_values_that_nobody_knows_do_not_count(blocks, tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.normal(100, 20, (2, 5, 30, 40)).astype(np.float32)
    truth[:, :2] = 0  # of some blocks all
    truth[0][rng.random(truth.shape[1:]) < 0.3] = 0
    predicted = truth + rng.normal(0, 5, truth.shape).astype(np.float32)
    for name, array in (("truth", truth), ("predicted", predicted)):
        np.save(tmp_path / f"{name}.npy", array)
    made = evaluate(str(tmp_path / "predicted.npy"), str(tmp_path / "truth.npy"), ignore=0)
    known = (truth != 0).all(axis=0)
    far = (predicted.astype(np.float64) - truth)[:, known]
    assert (made.n_voxels, made.n_ignored) == (known.sum(), (~known).sum())
    assert made.figures.mae == pytest.approx(np.abs(far).mean())
    spans = np.ptp(truth[:, known].astype(np.float64), axis=1)[:, None]
    assert made.figures.psnr_db == pytest.approx(-10 * np.log10(np.mean((far / spans) ** 2)))


def test_the_command_says_how_many_voxels_do_not_count(labels, tmp_path, capsys):
    path, classes = labels
    truth = sparse_truth(classes, values=CLASSES)
    np.save(tmp_path / "truth.npy", truth)
    document, _ = told(capsys, "evaluate", path, tmp_path / "truth.npy", "--ignore", IGNORE)
    n_ignored = int((truth == IGNORE).sum())
    assert (document["voxels"], document["voxels_ignored"]) == (truth.size - n_ignored, n_ignored)
    assert main(["evaluate", path, str(tmp_path / "truth.npy"), "--ignore", str(IGNORE)]) == 0
    assert f"voxels ignored {n_ignored:,}" in " ".join(capsys.readouterr().out.split())
    _, (line,) = told(capsys, "evaluate", path, tmp_path / "truth.npy")
    assert "the truth must hold the classes (3, 9, 200) or (0, 1, 2), got [3, 9, 200, 255]" in line
    np.save(tmp_path / "truth.npy", np.where(truth == IGNORE, 3, truth))
    document, _ = told(capsys, "evaluate", path, tmp_path / "truth.npy", "--ignore=-1")
    assert (document["voxels"], document["voxels_ignored"]) == (truth.size, 0)
    document, _ = told(capsys, "evaluate", path, tmp_path / "truth.npy")
    assert "voxels_ignored" not in document


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_truth_of_which_nothing_counts_is_refused(tmp_path, capsys, dtype):
    np.save(tmp_path / "truth.npy", np.full((9, 9), 4, dtype))
    _, (line,) = told(capsys, "evaluate", tmp_path / "truth.npy", tmp_path / "truth.npy", "--ignore", 4)
    assert "the truth must have voxels that count, got 4 in all of " in line
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "a.npy", "b.npy", "--ignore", "some"])
    assert "invalid int value: 'some'" in capsys.readouterr().err
