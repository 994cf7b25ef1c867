"""Models by name: the newest or the version that is asked for, and never one written over."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.errors import ArgumentError, ModelError, TakenError
from pipeline.store.location import Location
from pipeline.store.shelf import called, model_path, to_be_written


@pytest.fixture(params=["folder", "bucket"])
def shelf(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = str(tmp_path / "shelf") if request.param == "folder" else f"memory://{tmp_path.name}/shelf"
    monkeypatch.setenv("HALOSEG_MODELS", root)
    return root


def write(path, content=b"model"):
    Location(path).write_bytes(content)


def test_a_name_is_its_newest_version_and_a_path_is_a_path(shelf, tmp_path):
    for version in (1, 2, 10):
        with to_be_written("cells") as path:
            assert path == f"{shelf}/cells/{min(version, 3)}.safetensors"
            write(path)
    write(f"{shelf}/cells/10.safetensors")
    write(f"{shelf}/cells/11.safetensors.checkpoint")
    assert model_path("cells") == f"{shelf}/cells/10.safetensors"
    assert model_path("cells@2") == f"{shelf}/cells/2.safetensors"
    for path in ("here/cells", "cells.safetensors", "s3://bucket/cells", str(tmp_path / "cells")):
        assert model_path(path) == path
        with to_be_written(path) as same:
            assert same == path
    paths = (f"{shelf}/cells/10.safetensors", "a/nuclei.safetensors")
    assert [called(path) for path in paths] == ["cells-10", "nuclei"]
    (tmp_path / "cells").write_bytes(b"a file of this name")
    assert model_path("cells") == "cells"


def test_a_version_that_is_in_the_making_is_gone_on_with_and_by_one_alone(shelf):
    with to_be_written("cells") as path:
        write(f"{path}.checkpoint")
        with pytest.raises(TakenError, match="a model is worked on by one run at a time"), to_be_written("cells"):
            pass
    with to_be_written("cells") as again:
        assert again == path


def test_what_is_not_there_is_said_with_what_is(shelf):
    with pytest.raises(ModelError, match=r"a file or a name in .*shelf \(none\), got cells"):
        model_path("cells")
    write(f"{shelf}/cells/1.safetensors")
    with pytest.raises(ModelError, match=r"a file or a name in .*shelf \(cells\), got nuclei"):
        model_path("nuclei")
    with pytest.raises(ModelError, match=r"versions of cells in .*shelf are 1, got cells@2; choose one"):
        model_path("cells@2")
    with pytest.raises(ArgumentError, match="next version of its name, got cells@2; use cells"), to_be_written(
        "cells@2"
    ):
        pass
    with pytest.raises(ModelError, match=r"versions of cells in .*shelf are 1, got cells@0; choose one"):
        model_path("cells@0")


@pytest.mark.parametrize("name", ["scan.npy", "./truth", "scan.safetensors"])
def test_a_model_replaces_a_model_and_no_other_file_or_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    np.save("scan.npy", np.arange(99))
    Path("truth").write_bytes(b"what somebody has drawn by hand")
    Path("scan.safetensors").write_bytes(Path("scan.npy").read_bytes())
    before = Path(name).read_bytes()
    with pytest.raises(ArgumentError, match="must not replace a file of another kind"), to_be_written(name) as path:
        write(path)
    assert Path(name).read_bytes() == before
    for kind in ("./other", "other.safetensors"):
        for weights in (np.zeros(3, np.float32), np.ones(2, np.float32)):
            with to_be_written(kind) as path:
                save_file({"weight": weights}, path)
    Path("scan.zarr").mkdir()
    for folder in (".", "scan.zarr", "scan.zarr/"):
        with pytest.raises(ArgumentError, match="a model must be a file, got the folder"), to_be_written(folder):
            pass
