import errno
import os

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import StorageError, StoreError
from pipeline.store.location import Location, storage_errors


def test_files_below_a_folder_are_listed_by_their_relative_names(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "0").write_bytes(b"x")
    (tmp_path / "a" / "zarr.json").write_text("{}")
    assert sorted(Location(str(tmp_path / "a")).files()) == ["b/0", "zarr.json"]
    assert list(Location(str(tmp_path / "nothing")).files()) == []


def test_where_no_json_can_lie_there_is_none(tmp_path):
    (tmp_path / "scan.tif").write_bytes(b"II*\0")
    assert Location(str(tmp_path / "scan.tif" / "zarr.json")).read_json() == {}
    assert Location(str(tmp_path / "nothing" / "zarr.json")).read_json() == {}


def test_colons_in_a_path_are_a_part_of_its_name(tmp_path):
    (tmp_path / "scan.h5").write_bytes(b"not ours")  # fsspec takes "a::b" for a thing inside of b
    dataset = Location(f"{tmp_path}/scan.h5::labels")
    assert (dataset / "zarr.json").read_json() == {}
    dataset.delete()
    assert (tmp_path / "scan.h5").read_bytes() == b"not ours"
    (dataset / "0").write_bytes(b"ours")
    assert list(dataset.files()) == ["0"]


def test_memory_urls_work_as_folders_do():
    home = Location("memory://haloseg-location")
    (home / "x" / "0").write_bytes(b"abc")
    assert list((home / "x").files()) == ["0"]
    assert (home / "x" / "0").read_bytes() == b"abc"
    home.delete()
    assert not (home / "x").exists()


@pytest.mark.parametrize(("path", "parent", "name"), [
    ("a/b.zarr", "a", "b.zarr"), ("b.zarr", ".", "b.zarr"), ("/b.zarr", "/", "b.zarr"), ("s3://x/y/", "s3://x", "y"),
])  # fmt: skip
def test_parents(path, parent, name):
    assert (Location(path).parent.url, Location(path).name) == (parent, name)


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path, monkeypatch):
    file = Location(str(tmp_path / "a" / "x.json"))
    file.write_bytes(b"old")
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="a full disk at"):
            file.write_bytes(b"new")
    assert (file.read_bytes(), [each.name for each in file.parent.entries()]) == (b"old", ["x.json"])
    left = tmp_path / "a" / ".x.json.0f.partial"
    left.write_bytes(b"ne")
    file.delete_leftovers()
    file.write_bytes(b"new")
    assert (file.read_bytes(), left.exists()) == (b"new", False)


def full(_descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")


class Mute(MemoryFileSystem):
    """A store that refuses every answer, as one without credentials does."""

    protocol = "mute"

    def exists(self, path, **options):
        raise RuntimeError("Unable to\nlocate credentials")

    cat_file = exists


def test_a_store_that_does_not_answer_is_one_line():
    fsspec.register_implementation("mute", Mute, clobber=True)
    location = Location("mute://bucket/scan.zarr")
    for ask in (location.exists, location.read_json, location.delete, lambda: list(location.files())):
        with pytest.raises(StorageError, match=r"storage must answer at mute://.*Unable to locate credentials"):
            ask()


def test_damaged_metadata_is_one_line(tmp_path):
    (tmp_path / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="metadata must be JSON"):
        (Location(str(tmp_path)) / "zarr.json").read_json()


def test_a_full_disk_is_a_storage_error_and_other_errors_stay_themselves():
    with pytest.raises(StorageError, match="full disk"), storage_errors(Location("x")):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(TimeoutError), storage_errors(Location("x")):
        raise TimeoutError
