import hashlib
import io
import json
import zipfile

import numpy as np
import pytest
import torch
import yaml
from foreign import random_network
from torch import nn
from volumes import model_file

from pipeline.errors import ModelError
from pipeline.export import export_bioimageio
from pipeline.importing import import_package
from pipeline.store.scaling import Scaling
from pipeline.store.statistics import Normalisation
from pipeline.unet.foreign.adopt import Description
from pipeline.unet.foreign.bioimageio import Package, Preprocessing
from pipeline.unet.foreign.torchscript import deprecated
from pipeline.unet.model import build, load_model
from pipeline.unet.settings import Head, Padding, UNetSettings

ABOUT = Description("")
SOURCE = '''
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width, n_classes=2):
        super().__init__()
        self.a = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.b = nn.ConvTranspose2d(width, n_classes, 2, 2)

    def forward(self, x):
        return self.b(torch.max_pool2d(self.norm(self.a(x)).relu(), 2))
'''


def npy(array):
    content = io.BytesIO()
    np.save(content, np.asarray(array, np.float32))
    return content.getvalue()


def net():
    scope = {}
    exec(SOURCE, scope)
    return random_network(lambda: scope["Net"](4))


def state_of(network):
    content = io.BytesIO()
    torch.save(network.state_dict(), content)
    return content.getvalue()


def package(folder, network, *, gain=0.5, version="0.5.3", **change):
    """Write a package with a state dict, a scale_linear preprocessing and a sigmoid after it; return its rdf.yaml."""
    raw = np.random.default_rng(0).normal(size=(1, 1, 16, 24)).astype(np.float32)
    with torch.no_grad():
        likely = network(torch.from_numpy(raw * gain + 1)).sigmoid().numpy()
    files = {"net.py": SOURCE.encode(), "w.pt": state_of(network), "in.npy": npy(raw), "out.npy": npy(likely)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    described = {name: {"source": name, "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    space = [{"type": "space", "id": a, "size": {"min": 8, "step": 2}} for a in "yx"]
    axes = [{"type": "batch"}, {"type": "channel", "channel_names": ["raw"]}, *space]
    document = {
        "type": "model", "format_version": version, "name": "a package",
        "inputs": [{"id": "raw", "axes": axes, "test_tensor": described["in.npy"], "preprocessing": [
            {"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},
            {"id": "scale_linear", "kwargs": {"gain": gain, "offset": 1.0}},
        ]}],
        "outputs": [{
            "id": "likely", "test_tensor": described["out.npy"], "postprocessing": [{"id": "sigmoid"}],
            "axes": [{"type": "batch"}, {"type": "channel", "channel_names": ["wall", "cell"]}, *space],
        }],
        "weights": {"pytorch_state_dict": described["w.pt"] | {
            "architecture": described["net.py"] | {"callable": "Net", "kwargs": {"width": 4}}}},
    } | change  # fmt: skip
    (folder / "rdf.yaml").write_text(yaml.safe_dump(document))
    return str(folder / "rdf.yaml")


def test_a_state_dict_becomes_a_model_that_gives_the_packages_output(tmp_path):
    network = net()
    path = package(tmp_path, network)
    model = import_package(path, about=ABOUT, trust=True)
    assert model.settings.source == "bioimage.io package a package"
    assert (model.settings.head, model.classes) == (Head.SIGMOID, ("none", "wall", "cell"))
    assert (model.normalisation, model.rule.halo) == (Normalisation.NONE, (2, 2))
    x = torch.randn(2, 1, 30, 20)
    with torch.no_grad():
        torch.testing.assert_close(build(model, "cpu")(x), network(x * 0.5 + 1), atol=1e-5, rtol=0)
    zipped = tmp_path / "package.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        for file in tmp_path.iterdir():
            if file != zipped:
                archive.write(file, file.name)
    assert import_package(str(zipped), about=ABOUT, trust=True).rule == model.rule


def test_a_package_of_the_older_format_is_taken(tmp_path):
    path = package(tmp_path, net())
    document = yaml.safe_load((tmp_path / "rdf.yaml").read_text())
    weights = {"source": "w.pt", "architecture": "net.py:Net", "kwargs": {"width": 4}}
    document |= {
        "format_version": "0.4.10", "test_inputs": ["in.npy"], "test_outputs": ["out.npy"],
        "inputs": [{"name": "raw", "axes": "bcyx", "preprocessing": [
            {"name": "scale_linear", "kwargs": {"axes": "yx", "gain": [0.5], "offset": [1.0]}}]}],
        "outputs": [{"name": "likely", "axes": "bcyx", "postprocessing": [{"name": "sigmoid"}]}],
        "weights": {"pytorch_state_dict": weights},
    }  # fmt: skip
    (tmp_path / "rdf.yaml").write_text(json.dumps(document))
    model = import_package(path, about=Description("", classes=("none", "a", "b")), trust=True)
    assert (model.settings.head, model.classes) == (Head.SIGMOID, ("none", "a", "b"))


@pytest.mark.parametrize(("head", "limits"), [
    (Head.SOFTMAX, {"normalisation": Normalisation.PERCENTILE}),
    (Head.SIGMOID, {"normalisation": Normalisation.PERCENTILE, "limits": ((0.5, 99.8),)}),
    (Head.SOFTMAX, {"normalisation": Normalisation.WINDOW, "limits": ((-160.0, 240.0),)}),
])  # fmt: skip
def test_a_model_that_goes_out_as_a_package_comes_back_the_same(tmp_path, head, limits):
    settings = UNetSettings(dims=2, width=2, depth=2, padding=Padding.SAME, head=head, n_classes=2, in_channels=2)
    ours = model_file(tmp_path / "m.safetensors", settings, **limits)
    export_bioimageio(ours, str(tmp_path / "m.zip"))
    with pytest.raises(ModelError, match=r"torchscript come with code .* add --trust"):
        import_package(str(tmp_path / "m.zip"), about=ABOUT, trust=False)
    back, model = import_package(str(tmp_path / "m.zip"), about=ABOUT, trust=True), load_model(ours)
    size = back.settings.tile  # a trace of ours computes with its sizes: they are written down as numbers
    assert size == back.rule.tile_shape(back.rule.stride)
    assert all(a % b == 0 and a >= 32 for a, b in zip(back.rule.stride, model.rule.stride, strict=True))
    assert (back.classes, back.scaling, back.settings.head) == (
        model.classes if head is Head.SOFTMAX else ("none", *model.classes[1:]), model.scaling, head,
    )  # fmt: skip
    x = torch.randn(2, 2, *size)
    torch.testing.assert_close(build(back, "cpu")(x), build(model, "cpu")(x), atol=1e-5, rtol=0)


def test_scripted_networks_are_taken_for_the_size_of_their_test_input(tmp_path):
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x):
            size = x.shape[2:]
            small = torch.nn.functional.max_pool2d(self.a(x), 2)
            return torch.nn.functional.interpolate(small, size=size)

    network = random_network(Scripted)
    path = package(tmp_path, network)
    with deprecated():
        torch.jit.save(torch.jit.script(network), tmp_path / "s.pt")
    document = yaml.safe_load((tmp_path / "rdf.yaml").read_text())
    document["weights"] = {"torchscript": {"source": "s.pt"}}
    (tmp_path / "rdf.yaml").write_text(yaml.safe_dump(document))
    model = import_package(path, about=ABOUT, trust=True)
    assert model.settings.tile == (16, 24) == model.rule.tile_shape(model.rule.stride)


def test_no_code_is_run_without_trust(tmp_path):
    path = package(tmp_path, net())
    (tmp_path / "net.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ModelError, match=r"pytorch_state_dict come with code .* look at the package, then add --trust"):
        import_package(path, about=ABOUT, trust=False)
    with pytest.raises(ModelError, match=r"must be those described, got another net\.py"):
        import_package(path, about=ABOUT, trust=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"onnx": {"source": "w.pt"}}}, "must be pytorch_state_dict or torchscript, got onnx"),
        ({"format_version": "0.3.0"}, "model RDF 0.4 or 0.5, got 0.3.0"),
        ({"inputs": []}, "must have one input, got 0"),
        ({"type": "dataset"}, "must describe a model"),
        ({"weights": {"torchscript": {"source": "../w.pt"}}}, "must lie beside its rdf.yaml"),
        ({"weights": {"torchscript": {"source": "in.npy"}}}, "TorchScript must be convertible"),
    ],
)
def test_packages_that_do_not_suffice_are_refused(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        import_package(package(tmp_path, net(), **change), about=ABOUT, trust=True)


def scaled_by(steps, x):
    """Return what a package's steps make of intensities, by their definitions in the RDF."""
    for step in steps:
        k = step["kwargs"]
        x = x.clip(k["min"], k["max"]) if step["id"] == "clip" else x * k["gain"] + k["offset"]
    return x


@pytest.mark.parametrize("gain", [0.01, -0.5])
def test_values_that_are_clipped_and_then_scaled_reach_the_network_so(tmp_path, gain):
    steps = [
        {"id": "clip", "kwargs": {"min": -1, "max": 2}}, {"id": "scale_linear", "kwargs": {"gain": gain, "offset": 3}}
    ]
    read = Package("a", {}, bytes, tuple(steps), (), None, np.zeros(1), None).scale()
    x = np.linspace(-3, 4, 50)
    (window,) = Scaling(read.normalisation, read.limits).windows([None], dtype="float32")
    seen = ((x - window.offset) * window.scale).clip(window.low, window.high)
    got = (seen - read.mean[0]) / read.std[0]
    np.testing.assert_allclose(got, scaled_by(steps, x), atol=1e-12)


def test_percentiles_are_taken_as_they_are_or_refused(tmp_path):
    def scale(low, high):
        step = {"id": "scale_range", "kwargs": {"min_percentile": low, "max_percentile": high}}
        return Package("a", {}, bytes, (step,), (), None, np.zeros(1), None).scale()

    assert scale(1, 99.8).limits == ((1.0, 99.8),)
    assert (scale(1, 99), scale(0, 100).normalisation) == (Preprocessing(Normalisation.PERCENTILE), Normalisation.RANGE)
    with pytest.raises(ModelError, match=r"must be those that ingest stores, .*, got 1\.5; say --normalisation perc"):
        scale(1.5, 99)


def test_other_preprocessing_is_refused_unless_told_what_comes_near(tmp_path):
    path = package(tmp_path, net())
    text = (tmp_path / "rdf.yaml").read_text()
    (tmp_path / "rdf.yaml").write_text(text.replace("scale_linear", "clip"))
    with pytest.raises(ModelError, match=r"preprocessing must be one of .*, got clip; .*--normalisation"):
        import_package(path, about=ABOUT, trust=True)
    model = import_package(path, about=Description("", normalisation=Normalisation.ZSCORE), trust=True)
    assert model.normalisation is Normalisation.ZSCORE


def test_a_test_output_that_does_not_come_out_is_refused(tmp_path):
    path = package(tmp_path, net())
    text = (tmp_path / "rdf.yaml").read_text()
    (tmp_path / "rdf.yaml").write_text(text.replace("gain: 0.5", "gain: 5.0"))
    with pytest.raises(ModelError, match="test output must come out, got one that differs by"):
        import_package(path, about=ABOUT, trust=True)


def test_files_that_are_no_packages_are_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"hello")
    (tmp_path / "b.yaml").write_text("[")
    for name in ("a.zip", "b.yaml", "none.zip"):
        with pytest.raises(ModelError, match=r"must be a \.zip or rdf\.yaml of bioimage\.io"):
            import_package(str(tmp_path / name), about=ABOUT, trust=True)
