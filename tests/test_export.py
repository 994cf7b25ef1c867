import gc
import importlib.util
import io
import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from foreign import Encoder, random_network, saved
from volumes import model_file

from pipeline.errors import ArgumentError
from pipeline.export import export_bioimageio
from pipeline.store.statistics import Normalisation
from pipeline.unet.foreign.adopt import Description, adopt
from pipeline.unet.foreign.pt2 import read_pt2
from pipeline.unet.foreign.torchscript import deprecated
from pipeline.unet.model import load_model, save_model
from pipeline.unet.settings import Head, Padding, UNetSettings

SPEC = importlib.util.find_spec("bioimageio") and importlib.util.find_spec("bioimageio.spec")
CORE = importlib.util.find_spec("bioimageio") and importlib.util.find_spec("bioimageio.core")
VALID = UNetSettings(dims=2, width=2, depth=2, n_classes=3)
CASES = {
    "2-D valid": (VALID, {"voxel_size_um": (0.5, 0.25)}),
    "3-D same, sigmoid, two channels": (
        UNetSettings(dims=3, width=2, depth=1, padding=Padding.SAME, head=Head.SIGMOID, n_classes=1, in_channels=2), {}
    ),
    "a foreign one": (None, {}),
    "a window": (VALID, {"normalisation": Normalisation.WINDOW, "limits": ((60.0, 200.0),)}),
    "slice by slice": (VALID, {"normalisation": Normalisation.ZSCORE_SLICEWISE}),
    "two percentiles": (VALID, {"normalisation": Normalisation.PERCENTILE, "limits": ((0.5, 99.5),)}),
}  # fmt: skip


def package(tmp_path, settings, about):
    """Export a model; return the paths of both."""
    model = tmp_path / "cells.safetensors"
    if settings is None:
        path = saved(tmp_path / "n.pt2", random_network(Encoder), (1, 1, 16, 16), dynamic=True)
        save_model(adopt(read_pt2(Path(path).read_bytes()), Description("a test")), model)
    else:
        model_file(model, settings, **about)
    out = tmp_path / "cells.zip"
    export_bioimageio(str(model), str(out), authors=("A. Uthor",), licence="CC-BY-4.0")
    return model, out


@pytest.fixture(scope="module", params=CASES, ids=str)
def packed(tmp_path_factory, request):
    return package(tmp_path_factory.mktemp("package"), *CASES[request.param])


def files_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def as_described(raw, steps):
    """Return intensities after the steps of a description, as bioimage.io defines them."""
    space, x = tuple(range(2, raw.ndim)), raw.astype(np.float64)
    for step in steps:
        about = step["kwargs"]
        match step["id"]:
            case "ensure_dtype":
                assert about == {"dtype": "float32"}
            case "zero_mean_unit_variance":
                x = (x - x.mean(space, keepdims=True)) / (x.std(space, keepdims=True) + about["eps"])
            case "scale_range":
                ends = about["min_percentile"], about["max_percentile"]
                low, high = np.percentile(x, ends, axis=space, keepdims=True)
                x = (x - low) / (high - low + about["eps"])
            case "clip":
                x = x.clip(about["min"], about["max"])
            case "scale_linear":
                x = x * about["gain"] + about["offset"]
    return x.astype(np.float32)


def test_weights_and_test_tensors_are_those_of_the_model(packed):
    model, out = load_model(packed[0]), files_of(packed[1])
    described = yaml.safe_load(out["rdf.yaml"])
    raw, likely = (np.load(io.BytesIO(out[f"test_{end}.npy"])) for end in ("input", "output"))
    assert raw.dtype == likely.dtype == np.float32
    scaled = as_described(raw, described["inputs"][0]["preprocessing"])
    with deprecated():
        script = torch.jit.load(io.BytesIO(out["weights.pt"]))
        got = script(torch.from_numpy(scaled)).detach().numpy()
    np.testing.assert_allclose(got, likely, atol=1e-4)
    cropped = [n - 2 * axis.get("halo", 0) for n, axis in zip(likely.shape[2:], described["outputs"][0]["axes"][2:],
                                                              strict=True)]  # fmt: skip
    assert tuple(cropped) == model.rule.core_shape(raw.shape[2:])
    assert described["config"]["haloseg"]["sha256"] == model.digest


def test_sizes_are_those_of_the_tile_rule(tmp_path):
    model, out = package(tmp_path, *CASES["2-D valid"])
    rule, described = load_model(model).rule, yaml.safe_load(files_of(out)["rdf.yaml"])
    y = described["inputs"][0]["axes"][2]
    assert y == {"type": "space", "id": "y", "size": {"min": rule.tile_shape(rule.stride)[0], "step": 4}, "scale": 0.5,
                 "unit": "micrometer"}  # fmt: skip
    # 20 voxels lost on each side, none of them to be cropped after
    assert described["outputs"][0]["axes"][3]["size"] == {"tensor_id": "raw", "axis_id": "x", "offset": -40}
    assert described["outputs"][0]["axes"][1]["channel_names"] == ["class 0", "class 1", "class 2"]


# bioimageio.spec 0.5.12 leaves the package's file to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not SPEC, reason="needs bioimageio.spec: pip install bioimageio.spec")
def test_the_package_is_valid_by_the_official_validator(packed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic's and its own parts
        from bioimageio.spec import load_description

        summary = load_description(packed[1]).validation_summary
        gc.collect()  # here, where nobody minds
    assert summary.status in ("valid-format", "passed"), summary.format()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.skipif(not CORE, reason="needs bioimageio.core: pip install bioimageio.core")
def test_another_program_reproduces_the_test_output(tmp_path):
    _, out = package(tmp_path, *CASES["2-D valid"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        from bioimageio.core import test_model as run_test

        summary = run_test(out)
        gc.collect()
    assert summary.status == "passed", summary.format()


def test_the_same_model_is_the_same_package(tmp_path):
    model, out = package(tmp_path, *CASES["2-D valid"])
    again = tmp_path / "again.zip"
    export_bioimageio(str(model), str(again), authors=("A. Uthor",), licence="CC-BY-4.0")
    first, second = files_of(out), files_of(again)
    assert {name for name in first if first[name] != second[name]} <= {"rdf.yaml", "weights.pt"}
    assert json.dumps(yaml.safe_load(first["rdf.yaml"])["inputs"]) == json.dumps(
        yaml.safe_load(second["rdf.yaml"])["inputs"]
    )


@pytest.mark.parametrize(
    ("out", "name", "about", "message"),
    [
        ("x.tar", "", {}, "must be a .zip"), ("x.zip", "abc", {}, "5 to 128 letters"),
        ("x.zip", "", {"normalisation": Normalisation.DTYPE}, "no word for normalisation dtype"),
    ],
)
def test_packages_that_would_not_be_valid_are_refused(tmp_path, out, name, about, message):
    model = model_file(tmp_path / "m.safetensors", VALID, **about)
    with pytest.raises(ArgumentError, match=message):
        export_bioimageio(model, str(tmp_path / out), name=name)
    assert not (tmp_path / out).exists()
