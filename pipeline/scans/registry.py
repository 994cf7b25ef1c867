"""The formats that can be read, one line each, and the choice among them by content where that is cheap.

A reader is a function ``open(path: str, /) -> LazyScan``, named as "module:function", imported
when a scan needs it, so that no format costs those who do not use it anything, and the Zarr reader may live beside the
other uses of zarr.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath

from pipeline.errors import ScanError
from pipeline.scans.files import (
    BY_RANGES,
    DICOMDIR,
    FILES,
    MRC,
    PICTURES,
    dicom_candidates,
    fetched,
    is_dicom_file,
    is_remote,
)  # fmt: skip
from pipeline.scans.lazy import LazyScan, damage_named

_ZARR_FILES = ("zarr.json", ".zgroup", ".zarray", ".zattrs")
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


def is_zarr(path: str) -> bool:
    """Whether this is a URL or a Zarr folder."""
    if is_remote(path):
        return not is_remote_file(path)
    return path.rstrip("/").endswith(".zarr") or any((Path(path) / f).exists() for f in _ZARR_FILES)


def is_remote_file(path: str) -> bool:
    """Whether this is the URL of a scan in one file."""
    return is_remote(path) and _ending(path) in FILES


def check_on_disk(path: str) -> None:
    """Refuse the URL of a scan in one file that can be read from a disk alone."""
    if is_remote_file(path) and _ending(path) not in BY_RANGES:
        raise ScanError(
            f"a scan at a URL must be a Zarr, a TIFF or HDF5, got {path}, which is another file; copy it to a disk and "
            "ingest it from there"
        )


def _ending(path: str) -> str:
    return PurePosixPath(path.partition("::")[0]).suffix.lower()


def is_tiff(path: str) -> bool:
    """Whether this is a TIFF file, or calls itself one."""
    return Path(path).suffix.lower() in {".tif", ".tiff", ".svs"} or _start(path).startswith(_TIFF_MAGIC)


def is_picture(path: str) -> bool:
    """Whether this is a PNG or JPEG file, or an empty one that calls itself one: a copy that has just begun."""
    if start := _start(path):
        return start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"))
    return Path(path).suffix.lower() in {".png", ".jpg", ".jpeg"} and not is_remote(path) and Path(path).is_file()


def is_hdf5(path: str) -> bool:
    """Whether this names a dataset, or is an HDF5 file or calls itself one."""
    return "::" in path or Path(path).suffix.lower() in {".h5", ".hdf5"} or _start(path) == _HDF5_MAGIC


def is_npy(path: str) -> bool:
    """Whether this is a NumPy file, or calls itself one."""
    return _start(path).startswith(b"\x93NUMPY") or Path(path).suffix.lower() == ".npy"


def is_slices(path: str) -> bool:
    """Whether this is a folder with pictures, or a glob."""
    folder = Path(path)
    if is_remote(path):
        return False
    if folder.is_dir():
        return any(p.suffix.lower() in PICTURES for p in folder.iterdir())
    return not folder.exists() and glob.has_magic(path)


def is_dicom(path: str) -> bool:
    """Whether this is a DICOM file, a folder or glob with some, or a medium's folder; it may name a series."""
    place = path.partition("::")[0]
    if is_remote(path):
        return False
    is_medium = (Path(place) / DICOMDIR).is_file() and not is_slices(place)
    return is_medium or any(map(is_dicom_file, dicom_candidates(place)))


def is_dicom_volume(path: str) -> bool:
    """Whether a DICOM file is a volume of its own, not a slice; False where pydicom is missing."""
    try:
        found: bool = import_module("pipeline.scans.dicom_pixels").is_volume(path)
    except ScanError:
        return False
    return found


def is_nifti(path: str) -> bool:
    """Whether this is a NIfTI file in one piece, or calls itself one."""
    return path.lower().endswith((".nii", ".nii.gz")) or _start(path, 348)[344:] in (b"n+1\0", b"n+2\0")


def is_nrrd(path: str) -> bool:
    """Whether this is an NRRD file, or calls itself one."""
    return _start(path).startswith(b"NRRD0") or Path(path).suffix.lower() in {".nrrd", ".nhdr"}


def is_mrc(path: str) -> bool:
    """Whether this is an MRC file, or calls itself one."""
    return _start(path, 212)[208:] == b"MAP " or Path(path).suffix.lower() in MRC


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of scan: its name, whether a path is one, "module:function" of its reader, whether that reads URLs."""

    name: str
    claims: Callable[[str], bool]
    reader: str
    reads_urls: bool = False

    def open(self, path: str) -> LazyScan:
        """Return the scan at ``path``."""
        module, _, function = self.reader.partition(":")
        opened: LazyScan = getattr(import_module(module), function)(path)
        return opened


FORMATS: tuple[Format, ...] = (
    Format("OME-Zarr (folder or URL)", is_zarr, "pipeline.store.reader:open_zarr", reads_urls=True),
    Format("DICOM (a file, or a folder with one series)", is_dicom, "pipeline.scans.dicom:open_dicom"),
    Format("HDF5 (FILE.h5::DATASET)", is_hdf5, "pipeline.scans.hdf5:open_hdf5", reads_urls=True),
    Format("a folder or glob of PNG, JPEG or TIFF slices", is_slices, "pipeline.scans.slices:open_slices"),
    Format("PNG or JPEG", is_picture, "pipeline.scans.pictures:open_picture"),
    Format("NumPy (.npy)", is_npy, "pipeline.scans.npy:open_npy"),
    Format("NIfTI (.nii, .nii.gz)", is_nifti, "pipeline.scans.nifti:open_nifti"),
    Format("NRRD", is_nrrd, "pipeline.scans.nrrd:open_nrrd"),
    Format("MRC (.mrc, .rec, .map)", is_mrc, "pipeline.scans.mrc:open_mrc"),
    Format("TIFF (OME, BigTIFF, ImageJ, SVS)", is_tiff, "pipeline.scans.tiff:open_tiff", reads_urls=True),
)


def format_of(path: str) -> Format:
    """Return the format that reads ``path``.

    Raises
    ------
    ScanError : nothing is there, or nothing that can be read; the message lists what can.
    """
    check_on_disk(path)
    on_disk = path.partition("::")[0]
    if not is_remote(path) and not Path(on_disk).exists() and not any(glob.iglob(on_disk)):  # noqa: PTH207 absolute patterns
        raise ScanError(f"a scan must exist, got {path}; check the path")
    for candidate in FORMATS:
        if (candidate.reads_urls or not is_remote(path)) and candidate.claims(path):  # each asks storage anew
            return candidate
    readable = "; ".join(f.name for f in FORMATS)
    raise ScanError(f"a scan must be of a kind that can be read, got {path}; convert it to one of: {readable}")


def open_lazy(path: str) -> LazyScan:
    """Return the scan at ``path``, whatever its format.

    Raises
    ------
    ScanError : no scan is there, or it is damaged, in one line.
    """
    try:
        chosen = format_of(path)
        with damage_named(path):
            return chosen.open(path)
    except OSError as error:
        raise ScanError(f"a scan must be readable, got {path}: {error.strerror or error}; check the file") from error


def _start(path: str, n_bytes: int = 8) -> bytes:
    """Return the first bytes of a file; none of what is not a file."""
    if is_remote(path):
        return fetched(path, [(0, n_bytes)])[0]
    if not Path(path).is_file():
        return b""
    with Path(path).open("rb") as file:
        return file.read(n_bytes)
