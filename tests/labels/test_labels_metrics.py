from __future__ import annotations

import json
from math import isnan, nan

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score, precision_score, recall_score

from pipeline.errors import ArgumentError
from pipeline.geometry.grid import BlockGrid
from pipeline.labels.metrics import ContingencyTable, Figures

VALUES = (7, 0, 255)
DTYPES = (np.uint8, np.int16, np.int32, np.uint64)


@st.composite
def label_pairs(draw, values=VALUES):
    """Return predicted labels and truth of one shape, of 1 to 3 axes, each of its own dtype."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=7))
    choose = hnp.arrays(np.intp, shape, elements=st.integers(0, len(values) - 1))
    return tuple(np.array(values)[draw(choose)].astype(draw(st.sampled_from(DTYPES))) for _ in range(2))


def oracle(score, predicted, truth, **options):
    """Return scikit-learn's figure per class, NaN for 0/0."""
    return score(truth.ravel(), predicted.ravel(), labels=VALUES, average=None, zero_division=np.nan, **options)


@given(label_pairs())
def test_counts_are_scikit_learns_confusion_matrix(pair):
    predicted, truth = (each.astype(np.int64).ravel() for each in pair)
    table = ContingencyTable.of(*pair, values=VALUES)
    np.testing.assert_array_equal(table.counts, confusion_matrix(truth, predicted, labels=VALUES))
    assert table.counts.dtype == np.int64


@given(label_pairs())
def test_figures_are_scikit_learns(pair):
    predicted, truth = (each.astype(np.int64) for each in pair)
    figures = ContingencyTable.of(*pair, values=VALUES).figures()
    present = np.isin(VALUES, np.union1d(predicted, truth))
    for name, score in (
        ("jaccard", jaccard_score), ("dice", f1_score), ("precision", precision_score), ("recall", recall_score),
    ):  # fmt: skip
        ours = np.array([getattr(each, name) for each in figures.classes])
        if name == "jaccard":  # scikit-learn takes no NaN for it: a class in neither volume is left out by hand
            theirs = jaccard_score(truth.ravel(), predicted.ravel(), labels=VALUES, average=None, zero_division=0)
            theirs = np.where(present, theirs, nan)
        else:
            theirs = oracle(score, predicted, truth)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
        np.testing.assert_allclose(getattr(figures, f"mean_{name}"), np.nanmean(theirs), rtol=1e-12)
    assert figures.accuracy == pytest.approx(accuracy_score(truth.ravel(), predicted.ravel()), rel=1e-12)
    assert figures.pixel_error == pytest.approx(1 - figures.accuracy, abs=1e-15)
    assert [each.n_truth for each in figures.classes] == [int((truth == value).sum()) for value in VALUES]
    assert [each.n_predicted for each in figures.classes] == [int((predicted == value).sum()) for value in VALUES]


@given(label_pairs(), st.data())
def test_tables_of_blocks_add_up_to_the_table_of_the_volume(pair, data):
    predicted, truth = pair
    core = tuple(data.draw(st.integers(1, n)) for n in truth.shape)
    table = ContingencyTable.empty(len(VALUES))
    for block in BlockGrid(truth.shape, core):
        at = block.core.slices
        table = table + ContingencyTable.of(predicted[at], truth[at], values=VALUES)
    np.testing.assert_array_equal(table.counts, ContingencyTable.of(predicted, truth, values=VALUES).counts)


@given(label_pairs(), st.sampled_from((*VALUES, 31)))
def test_ignored_voxels_of_the_truth_do_not_count(pair, ignore):
    predicted, truth = pair
    counting = truth != ignore
    table = ContingencyTable.of(predicted, truth, values=VALUES, ignore=ignore)
    expected = ContingencyTable.of(predicted[counting], truth[counting], values=VALUES)
    np.testing.assert_array_equal(table.counts, expected.counts)


def test_the_ignored_value_need_be_no_class_and_anything_may_be_predicted_there():
    table = ContingencyTable.of(np.array([0, 9, 1]), np.array([0, 99, 1]), values=(0, 1), ignore=99)
    np.testing.assert_array_equal(table.counts, [[1, 0], [0, 1]])


@given(label_pairs(values=(0, 1, 2)))
def test_classes_may_be_called_otherwise_in_the_prediction(pair):
    predicted, truth = pair
    plain = ContingencyTable.of(predicted, truth, values=(0, 1, 2))
    called = np.array(VALUES, dtype=np.int64)[truth.astype(np.intp)]
    mapped = ContingencyTable.of(predicted, called, values=VALUES, predicted_values=(0, 1, 2))
    np.testing.assert_array_equal(mapped.counts, plain.counts)


def test_a_class_in_neither_volume_is_nan_and_in_no_mean():
    figures = ContingencyTable.of(np.array([0, 0, 1]), np.array([0, 1, 1]), values=(0, 1, 2)).figures()
    assert [each.dice for each in figures.classes[:2]] == pytest.approx([2 / 3, 2 / 3])
    absent = figures.classes[2]
    assert all(isnan(each) for each in (absent.dice, absent.jaccard, absent.precision, absent.recall))
    assert figures.mean_dice == pytest.approx(2 / 3)
    assert figures.mean_jaccard == pytest.approx(1 / 2)


def test_a_class_in_one_volume_alone_counts_as_zero():
    figures = ContingencyTable.of(np.array([0, 0]), np.array([0, 1]), values=(0, 1)).figures()
    missed = figures.classes[1]
    assert (missed.dice, missed.jaccard, missed.recall) == (0.0, 0.0, 0.0)
    assert isnan(missed.precision)
    assert figures.mean_jaccard == pytest.approx((1 / 2 + 0) / 2)


def test_no_voxels_have_no_figures():
    figures = ContingencyTable.empty(2).figures()
    assert isnan(figures.accuracy)
    assert isnan(figures.pixel_error)
    assert isnan(figures.mean_dice)


def test_figures_as_json_have_null_for_nan():
    figures = ContingencyTable.of(np.array([0]), np.array([0]), values=(0, 1)).figures()
    document = json.loads(json.dumps(figures.to_json(), allow_nan=False))
    assert document["classes"][1]["dice"] is None
    assert document["classes"][0] == {
        "dice": 1.0, "jaccard": 1.0, "precision": 1.0, "recall": 1.0, "n_truth": 1, "n_predicted": 1,
    }  # fmt: skip
    assert set(document) == set(Figures.__dataclass_fields__)


def test_counts_of_64_bit_labels_are_exact_where_floats_would_not_be():
    values = (2**63, 2**63 + 1, -1)
    labels = np.array([2**63, 2**63 + 1, 2**63 + 1], dtype=np.uint64)
    table = ContingencyTable.of(labels, labels, values=values)
    np.testing.assert_array_equal(np.diag(table.counts), [1, 2, 0])


def test_boolean_and_negative_labels_are_classes_too():
    table = ContingencyTable.of(
        np.array([True, False]), np.array([-1, -2], dtype=np.int8), values=(-1, -2), predicted_values=(1, 0)
    )
    np.testing.assert_array_equal(table.counts, np.eye(2))


@pytest.mark.parametrize(
    ("predicted", "truth", "options", "message"),
    [
        (np.zeros(3), np.zeros(3, int), {}, r"^predicted labels must be integers, got float64; convert them first$"),
        (np.zeros(3, int), np.zeros(3, "f4"), {}, r"^truth must be integers, got float32; convert them first$"),
        (np.zeros(3, int), np.zeros(4, int), {}, r"^predicted labels and truth must have one shape, got \(3,\) and "),
        (np.array([0, 5]), np.zeros(2, int), {}, r"^the predicted labels must hold the classes \(0, 1\) alone, got al"),
        (np.zeros(1, "u1"), np.array([9], "u1"), {}, r"^the truth must hold the classes \(0, 1\) alone, got also "),
        (np.array([0]), np.array([0]), {"predicted_values": (0,)}, r"^prediction and truth must have as many classes"),
        (np.array([0]), np.array([0]), {"values": (0, 0)}, r"^each class of the truth needs a value of its own, got "),
        (np.array([0]), np.array([0]), {"values": ()}, r"^each class of the truth needs a value of its own, got \(\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(predicted, truth, options, message):
    with pytest.raises(ArgumentError, match=message):
        ContingencyTable.of(predicted, truth, **{"values": (0, 1), **options})


def test_tables_of_other_classes_do_not_add():
    with pytest.raises(ArgumentError, match=r"^tables must be of the same classes to add, got 2 and 3 classes; "):
        ContingencyTable.empty(2) + ContingencyTable.empty(3)
    with pytest.raises(ArgumentError, match=r"^a table needs at least 1 class, got 0; use 1 or more$"):
        ContingencyTable.empty(0)


def test_figures_of_a_real_scan_are_scikit_learns(data):
    truth = tifffile.imread(data / "isbi2012" / "train-labels.tif", key=0)
    voxels = tifffile.imread(data / "isbi2012" / "train-volume.tif", key=0)
    predicted = (voxels > 110).astype(np.uint8)
    table = ContingencyTable.of(predicted, truth, values=(0, 255), predicted_values=(0, 1))
    flat_truth, flat = (truth == 255).ravel(), (predicted == 1).ravel()
    np.testing.assert_array_equal(table.counts, confusion_matrix(flat_truth, flat))
    figures = table.figures()
    assert figures.accuracy == pytest.approx(accuracy_score(flat_truth, flat), rel=1e-12)
    assert figures.mean_dice == pytest.approx(f1_score(flat_truth, flat, average="macro"), rel=1e-12)
    assert figures.mean_jaccard == pytest.approx(jaccard_score(flat_truth, flat, average="macro"), rel=1e-12)
    assert 0.6 < figures.accuracy < 0.95
