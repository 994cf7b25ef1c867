"""Evaluation of whole volumes against scikit-learn's figures, and against formulas in plain numpy."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, precision_score, recall_score
from volumes import model_file, scan_file

from pipeline.cli import main
from pipeline.compute.runner import run_serial
from pipeline.evaluate import evaluate
from pipeline.ingest import ingest, ingest_labels
from pipeline.overlaps import evaluate_overlapping
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.unet.settings import Head, Padding, UNetSettings

SHAPE = (3, 40, 30)
CLASSES = (3, 9, 200)
IGNORE = 255
OVERLAPPING = ("cells", "nuclei", "scars")
SCORES = {"dice": f1_score, "jaccard": jaccard_score, "precision": precision_score, "recall": recall_score}


@pytest.fixture
def blocks(monkeypatch):
    """Have volumes be compared by many blocks."""
    for name in ("evaluate.BLOCK", "overlaps.BLOCK", "compare._BLOCK"):
        monkeypatch.setattr(f"pipeline.{name}", {2: (16, 16), 3: (2, 16, 16)})


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


@pytest.fixture(scope="module")
def overlapping(tmp_path_factory):
    """Return a folder with an image, its probabilities of three labels that overlap, and the truth of each."""
    folder = tmp_path_factory.mktemp("overlapping")
    scan_file(folder / "scan.tif", SHAPE)
    image = str(ingest(str(folder / "scan.tif"), str(folder / "scan.zarr")).location)
    settings = UNetSettings(dims=2, width=4, depth=1, n_classes=3, padding=Padding.SAME, head=Head.SIGMOID)
    model_file(folder / "m.safetensors", settings, classes=("none", *OVERLAPPING))
    likely = segmented(folder, name="p")
    rng = np.random.default_rng(3)
    for number, name in enumerate(OVERLAPPING):
        truth = ((likely[number] > 0.4) ^ (rng.random(SHAPE) < 0.2)) * np.uint8(40 + number)
        truth[rng.random(SHAPE) < 0.3] = IGNORE
        np.save(folder / f"{name}.npy", truth)
    ingest_labels(str(folder / "cells.npy"), image=image, name="cells")
    return folder


def segmented(folder, *, name):
    """Return the probabilities that the model of this folder gives."""
    plan = plan_segment(str(folder / "scan.zarr"), model=str(folder / "m.safetensors"), name=name, probabilities=True)
    segment(plan, run=run_serial)
    return np.asarray(plan.probabilities.array[:])


@pytest.mark.parametrize("threshold", [None, 0.0, 0.31])
@pytest.mark.parametrize("names", [(), ("scars", "cells"), ("nuclei",)])
def test_each_label_that_overlaps_others_is_compared_for_itself(blocks, overlapping, names, threshold):
    likely = segmented(overlapping, name="p")
    truths = [str(overlapping / f"{name}.npy") for name in names or OVERLAPPING]
    made = evaluate_overlapping(
        str(overlapping / "scan.zarr/probabilities/p"), truths, channels=names, threshold=threshold, ignore=IGNORE
    )
    assert made.threshold == (0.5 if threshold is None else threshold)
    assert tuple(each.label for each in made.labels) == (names or OVERLAPPING)
    for each, path in zip(made.labels, truths, strict=True):
        truth = np.load(path)
        known = truth != IGNORE
        has = likely[OVERLAPPING.index(each.label)][known] > np.float32(made.threshold)
        want = truth[known] > 0
        assert (each.n_voxels, each.n_ignored) == (known.sum(), (~known).sum())
        assert (each.figures.n_truth, each.figures.n_predicted) == (want.sum(), has.sum())
        for figure, score in SCORES.items():
            assert getattr(each.figures, figure) == pytest.approx(score(want, has)), figure


def test_without_a_value_to_ignore_all_voxels_that_are_not_zero_have_the_label(overlapping):
    likely, truth = segmented(overlapping, name="p")[1] > 0.5, np.load(overlapping / "nuclei.npy") > 0
    made = evaluate_overlapping(
        str(overlapping / "scan.zarr/probabilities/p"), [str(overlapping / "nuclei.npy")], channels=["nuclei"]
    )
    assert (made.labels[0].n_voxels, made.labels[0].n_ignored) == (truth.size, None)
    assert made.labels[0].figures.dice == pytest.approx(2 * (likely & truth).sum() / (likely.sum() + truth.sum()))


def test_the_command_compares_labels_that_overlap(overlapping, capsys):
    probabilities = overlapping / "scan.zarr/probabilities/p"
    truths = [overlapping / "scan.zarr/labels/cells", *(overlapping / f"{name}.npy" for name in OVERLAPPING[1:])]
    document, _ = told(capsys, "evaluate", probabilities, *truths, "--ignore", IGNORE, "--threshold", 0.4)
    assert document["threshold"] == 0.4
    assert [each["label"] for each in document["labels"]] == list(OVERLAPPING)
    assert all(0.7 < each["dice"] < 1 for each in document["labels"])
    assert all(each["voxels"] + each["voxels_ignored"] == np.prod(SHAPE) for each in document["labels"])
    assert main(["evaluate", str(probabilities), str(truths[1]), "--channel", "nuclei"]) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("nuclei")]
    one, _ = told(capsys, "evaluate", probabilities, truths[1], "--channel", "nuclei")
    assert row[1] == f"{one['labels'][0]['dice']:.4g}"
    about, _ = told(capsys, "info", probabilities)
    assert (about["kind"], about["channels"], about["overlap"]) == ("probabilities", list(OVERLAPPING), True)
    assert (about["complete"], about["shape"], about["axes"]) == (True, [3, *SHAPE], "czyx")


def test_probabilities_are_compared_with_probabilities_by_their_values(overlapping, capsys):
    path = overlapping / "scan.zarr/probabilities/p"
    assert told(capsys, "evaluate", path, path)[0] == {"voxels": 3600, "mae": 0, "rmse": 0, "psnr_db": None}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["p", "cells.npy"], "each label needs a truth, in the same order, got 1 for cells, nuclei, scars; name as"),
        (["p", *["cells.npy"] * 4], "got 4 for cells, nuclei, scars; name as many, or fewer labels with --channel"),
        (["p", "cells.npy", "--channel", "cells,scars"], "in the same order, got 1 for cells, scars"),
        (["p", "cells.npy", "--channel", "cell"], "a channel must be one of cells, nuclei, scars, got cell for "),
        (["p", "cells.npy", "--channel", "cells", "--threshold", "1"], "at least 0 and under 1, got 1.0; use 0.5"),
        (["p", "cells.npy", "--channel", "cells", "--threshold", "nan"], "at least 0 and under 1, got nan; use 0.5"),
        (["p", "small.npy", "--channel", "cells"], "must have one shape, got (3, 40, 30) and (3, 40, 29)"),
        (["p", "real.npy", "--channel", "cells"], "that are whole numbers from 0 to 16777216, got 0.5 at z 0"),
        (["p", "all.npy", "--channel", "cells", "--ignore", "255"], "must have voxels that count, got 255 in all of "),
        (["cells.npy", "cells.npy", "cells.npy"], "need probabilities of labels that overlap, got none at cells.npy"),
        (["cells.npy", "cells.npy", "--threshold", "0.4"], "and --threshold need probabilities of labels that"),
        (["cells.npy", "cells.npy", "--channel", "cells"], "several truths, --channel and --threshold need"),
        (["none", "cells.npy", "--channel", "cells"], "got none at scan.zarr/probabilities/none; give IMAGE/prob"),
        (["s", "cells.npy"], "must overlap, got those of classes (class 0, class 1, class 2) at "),
    ],
)
def test_what_cannot_be_compared_label_by_label_is_refused(overlapping, monkeypatch, capsys, arguments, why):
    monkeypatch.chdir(overlapping)
    np.save("small.npy", np.zeros((3, 40, 29), np.uint8))
    np.save("real.npy", np.full(SHAPE, 0.5, np.float32))
    np.save("all.npy", np.full(SHAPE, IGNORE, np.uint8))
    if arguments[0] == "s":
        settings = UNetSettings(dims=2, width=4, depth=1, n_classes=3, padding=Padding.SAME)
        plan = plan_segment("scan.zarr", model=model_file("s.safetensors", settings), name="s", probabilities=True)
        segment(plan, run=run_serial)
    placed = [f"scan.zarr/probabilities/{each}" if each in {"p", "s", "none"} else each for each in arguments]
    document, lines = told(capsys, "evaluate", *placed)
    assert document is None
    assert len(lines) == 1
    assert why in lines[0]


def test_probabilities_that_are_not_complete_or_of_an_older_haloseg_are_refused(overlapping, capsys):
    segmented(overlapping, name="old")
    about = overlapping / "scan.zarr/probabilities/old/zarr.json"
    document = json.loads(about.read_text())
    command = ["evaluate", about.parent, *(overlapping / f"{name}.npy" for name in OVERLAPPING)]
    whole, _ = told(capsys, *command)
    for names, why in ((("channels", "overlap"), "must name their channels"), (("ome",), "must be complete")):
        ours = {key: value for key, value in document["attributes"]["haloseg"].items() if key not in names}
        ome = {} if "ome" in names else {"ome": document["attributes"]["ome"]}
        about.write_text(json.dumps(document | {"attributes": ome | {"haloseg": ours}}))
        assert why in told(capsys, *command)[1][0]
        assert told(capsys, "info", about.parent)[0]["complete"] is ("ome" not in names)
        segmented(overlapping, name="old")
        assert told(capsys, *command)[0] == whole
