"""Masks that are stored as floats, as tools of hospitals do: the integers that they mean, or none at all."""

import nibabel
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from volumes import scan_file, tree_digest

from pipeline.errors import ScanError
from pipeline.evaluate import Evaluated, evaluate
from pipeline.ingest import ingest, ingest_labels
from pipeline.labels.whole import as_labels, label_dtype

SHAPE = (24, 40, 50)
TRUTH = np.random.default_rng(0).integers(0, 5, SHAPE)
FLOATS = (np.float16, np.float32, np.float64)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    scan_file(folder / "scan.tif", SHAPE)
    return str(ingest(str(folder / "scan.tif"), str(folder / "scan.zarr"), chunk=(16,), shard=(16,)).location)


def mask_file(path, voxels):
    """Write a mask in the format of the ending, NIfTI so that it is read in the order of the voxels."""
    if path.suffix == ".nii":
        nibabel.save(nibabel.Nifti1Image(voxels.T, np.diag([-1, -1, 1, 1.0])), path)
    else:
        tifffile.imwrite(path, voxels, photometric="minisblack")
    return str(path)


@pytest.mark.parametrize("dtype", FLOATS)
@settings(deadline=None)
@given(data=st.data())
def test_floats_are_labels_as_far_as_every_whole_number_is_a_float(dtype, data):
    largest = next(2**n for n in range(64) if int(dtype(2**n + 1)) != 2**n + 1)
    values = data.draw(st.lists(st.integers(0, largest), min_size=1))
    labels = as_labels(np.array(values, dtype), axes="x", start=(0,), path="p")
    assert labels.dtype.kind == "u"
    assert labels.dtype == label_dtype(np.dtype(dtype))
    assert labels.tolist() == values
    above, below = np.nextafter(dtype(largest), dtype(np.inf)), np.nextafter(dtype(1), dtype(0))
    bad = data.draw(st.sampled_from([0.5, -1, np.nan, np.inf, -np.inf, above, below]))
    at = data.draw(st.integers(0, len(values)))
    voxels = np.array([*values[:at], bad, *values[at:]], dtype)[:, np.newaxis]
    with pytest.raises(ScanError, match=rf"whole numbers from 0 to {largest}, got .* at z {at + 7}, x 2 in p; conv"):
        as_labels(voxels, axes="zx", start=(7, 2), path="p")


@pytest.mark.parametrize(("ending", "dtype"), [(".tif", "f2"), (".tif", "f4"), (".nii", "f4"), (".nii", "f8")])
def test_a_mask_of_floats_becomes_the_labels_that_it_means(tmp_path, image, ending, dtype):
    mask, name = mask_file(tmp_path / f"mask{ending}", TRUTH.astype(dtype)), f"of-{ending[1:]}-{dtype}"
    labels = ingest_labels(mask, image=image, name=name)
    np.testing.assert_array_equal(labels.array[:], TRUTH)
    assert np.dtype(labels.dtype).kind == "u"
    assert ingest_labels(mask, image=image, name=name) == labels
    for pair in ((str(labels.location), mask), (mask, str(labels.location))):
        figures = evaluate(*pair)
        assert isinstance(figures, Evaluated)
        assert (figures.values, figures.figures.accuracy) == ((0, 1, 2, 3, 4), 1.0)


@pytest.mark.parametrize(("kind", "slope", "intercept"), [("u1", 1.0, 0.0), ("u1", 2.0, 0.0), ("f4", 0.5, 3.0)])
def test_a_nifti_mask_of_scaled_numbers_is_what_nibabel_says(tmp_path, image, kind, slope, intercept):
    about = nibabel.Nifti1Header()
    about.set_data_shape(SHAPE[::-1])
    about.set_data_dtype(kind)
    about.set_slope_inter(slope, intercept)
    about.set_sform(np.diag([-1, -1, 1, 1.0]), 1)
    about["magic"], about["vox_offset"] = b"n+1", 352
    (tmp_path / "mask.nii").write_bytes(about.binaryblock + bytes(4) + (2 * TRUTH).astype(kind).tobytes())
    expected = nibabel.load(tmp_path / "mask.nii").get_fdata().T
    labels = ingest_labels(str(tmp_path / "mask.nii"), image=image, name=f"scaled-{kind}-{slope}")
    np.testing.assert_array_equal(labels.array[:], expected)


@pytest.mark.parametrize("bad", [1.5, np.nan, np.inf, -1.0, 2.0**25])
def test_a_mask_with_one_bad_value_is_refused_whole(tmp_path, image, bad):
    before, voxels = tree_digest(image), TRUTH.astype(np.float32)
    voxels[23, 39, 45] = bad
    mask = mask_file(tmp_path / "mask.tif", voxels)
    with pytest.raises(ScanError, match=rf"float32 that .* 16777216, got {np.float32(bad)} at z 23, y 39, x 45 in "):
        ingest_labels(mask, image=image, name="bad")
    assert tree_digest(image) == before
    truth = ingest_labels(mask_file(tmp_path / "truth.tif", TRUTH.astype(np.uint8)), image=image, name=f"good{bad}")
    for pair in ((str(truth.location), mask), (mask, str(truth.location))):
        with pytest.raises(ScanError, match=rf"got {np.float32(bad)} at z 23, y 39, x 45"):
            evaluate(*pair)
