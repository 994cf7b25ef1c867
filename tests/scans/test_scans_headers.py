"""What headers of volumes say of units, byte order and sizes is heeded; what contradicts the voxels is refused."""

import gzip
import shutil

import mrcfile
import nibabel
import nrrd
import numpy as np
import pytest

from pipeline.errors import ScanError
from pipeline.scans.backend import open_scan
from pipeline.scans.cache import SegmentCache
from pipeline.scans.scratch import Scratch

VOXELS = np.random.default_rng(1).integers(0, 4000, (4, 3, 5), dtype=np.int16)


UNITS = {"mm": 1000, "microns": 1, "um": 1, "nm": 1e-3, "cm": 1e4, "m": 1e6}


@pytest.mark.parametrize(("unit", "um"), UNITS.items())
def test_lengths_of_nrrd_are_in_its_units(tmp_path, unit, um):
    steps = np.diag([2.0, 3.0, 4.0])
    about = {
        "oriented": {"space": "left-posterior-superior", "space directions": steps, "space units": [unit] * 3},
        "unknown": {"space dimension": 3, "space directions": steps, "space units": [unit] * 3},
        "spaced": {"spacings": [2.0, 3.0, 4.0], "units": [unit] * 3},
    }
    for name, header in about.items():
        nrrd.write(str(tmp_path / f"{name}.nrrd"), VOXELS.T, header)
        size = open_scan(tmp_path / f"{name}.nrrd").attrs["voxel_size_um"]
        assert size == pytest.approx((4 * um, 3 * um, 2 * um), rel=1e-6), name


def test_units_and_data_elsewhere_are_refused(tmp_path):
    nrrd.write(str(tmp_path / "odd.nrrd"), VOXELS.T, {"spacings": [1.0] * 3, "units": ["furlong"] * 3})
    with pytest.raises(ScanError, match=r"a unit must be one of mm, .*, got furlong in"):
        open_scan(tmp_path / "odd.nrrd")
    nrrd.write(str(tmp_path / "apart.nhdr"), VOXELS.T)
    with pytest.raises(ScanError, match=r"must be in one file, got its data in apart\.raw\.gz for .*; save it as one"):
        open_scan(tmp_path / "apart.nhdr")


@pytest.mark.parametrize("ending", ["nii.gz", "nrrd"])
@pytest.mark.parametrize("n_slices", [32, 33])
def test_one_wrong_bit_of_a_packed_volume_is_noticed(tmp_path, ending, n_slices):
    voxels = np.random.default_rng(2).integers(0, 255, (n_slices, 1024, 512), dtype=np.uint8)  # 32 slices: 16 MiB
    path = tmp_path / f"scan.{ending}"
    if ending == "nrrd":
        nrrd.write(str(path), voxels.T, {"encoding": "gzip"}, compression_level=1)
    else:
        path.write_bytes(gzip.compress(nibabel.Nifti1Image(voxels.T, np.eye(4)).to_bytes(), 1))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ScanError, match=f"must be whole and decodable, got .*scan.{ending}"):
        np.asarray(open_scan(path)[0])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["i2", "f4"])
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_either_byte_order_is_read(tmp_path, order, kind, ending):
    about = nibabel.Nifti1Header(endianness=order)
    about.set_data_shape(VOXELS.T.shape)
    about.set_data_dtype(kind)
    about.set_sform(np.diag([-1, -1, 1, 1]), 1)
    about["magic"], about["vox_offset"] = b"n+1", 352
    content = about.binaryblock + bytes(4) + VOXELS.astype(order + kind).tobytes()
    (tmp_path / f"scan.{ending}").write_bytes(gzip.compress(content) if ending == "nii.gz" else content)
    np.testing.assert_array_equal(open_scan(tmp_path / f"scan.{ending}"), VOXELS)
    mrcfile.write(tmp_path / "scan.mrc", VOXELS.astype(order + kind))
    assert (tmp_path / "scan.mrc").read_bytes()[212:214] == (b"\x11\x11" if order == ">" else b"DD")
    np.testing.assert_array_equal(open_scan(tmp_path / "scan.mrc"), VOXELS)


def test_names_do_not_matter_where_the_content_tells(tmp_path):
    nibabel.save(nibabel.Nifti1Image(VOXELS.T, np.diag([-1, -1, 1, 1])), tmp_path / "scan.nii.gz")
    (tmp_path / "plain").write_bytes(gzip.decompress((tmp_path / "scan.nii.gz").read_bytes()))
    shutil.copy(tmp_path / "scan.nii.gz", tmp_path / "packed.nii")
    for name in ("plain", "packed.nii"):
        np.testing.assert_array_equal(open_scan(tmp_path / name), VOXELS)


def test_sizes_below_one_are_damage(tmp_path):
    mrcfile.write(tmp_path / "scan.mrc", VOXELS)
    content = bytearray((tmp_path / "scan.mrc").read_bytes())
    content[8:12] = np.int32(-2).tobytes()
    (tmp_path / "scan.mrc").write_bytes(content)
    with pytest.raises(ScanError, match=r"its sizes must be above 0, got \(-2, 3, 5\)"):
        open_scan(tmp_path / "scan.mrc")


def test_a_volume_is_whole_without_a_disk_too(tmp_path, monkeypatch):
    nibabel.save(nibabel.Nifti1Image(VOXELS.T, np.diag([-1, -1, 1, 1])), tmp_path / "scan.nii.gz")
    monkeypatch.setattr("pipeline.scans.compressed._PIECE_BYTES", 7)
    none = SegmentCache(budget_bytes=10, scratch=Scratch(most_arrays=0))
    monkeypatch.setattr("pipeline.scans.compressed.DECODED", none)
    np.testing.assert_array_equal(open_scan(tmp_path / "scan.nii.gz"), VOXELS)


def test_a_length_that_is_not_told_is_not_invented(tmp_path):
    about = nibabel.Nifti1Header()
    about.set_data_shape(VOXELS.T.shape)
    about.set_data_dtype(np.int16)
    about["magic"], about["vox_offset"] = b"n+1", 352
    for lengths, size in (((-2, 3, 4), (4000, 3000, 2000)), ((2, 3, 0), None), ((2, np.nan, 4), None)):
        about["pixdim"][1:4] = lengths
        (tmp_path / "scan.nii").write_bytes(about.binaryblock + bytes(4) + VOXELS.tobytes())
        assert open_scan(tmp_path / "scan.nii").attrs.get("voxel_size_um") == size
