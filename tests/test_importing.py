import json

import numpy as np
import pytest
import tifffile
import torch
from foreign import Encoder, random_network, saved
from torch import nn
from volumes import scan_file, tree_digest

from pipeline.cli import main
from pipeline.store.arrays import open_array
from pipeline.store.image import open_image
from pipeline.store.labels import open_labels
from pipeline.store.location import Location
from pipeline.unet.model import load_model
from pipeline.unet.network import classes_of, probabilities_of


def printed(capsys, *arguments):
    """Run a command that must succeed with --json; return its document."""
    code = main([*(str(a) for a in arguments), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def refused(capsys, *arguments):
    """Run a command that must be refused in one line; return that line."""
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("haloseg:")]
    assert (code, out, len(lines)) == (2, "", 1), err
    return lines[0]


@pytest.fixture
def image(tmp_path, capsys):
    def make(shape, axes=""):
        voxels = scan_file(tmp_path / "scan.tif", shape)
        if axes:
            tifffile.imwrite(tmp_path / "scan.tif", voxels, photometric="minisblack", metadata={"axes": axes})
        n = len(shape) - axes.count("C")
        printed(capsys, "ingest", tmp_path / "scan.tif", tmp_path / "scan.zarr", "--chunk", ",".join(["16"] * n))
        return voxels, tmp_path / "scan.zarr"

    return make


def expected(voxels, image, model_path, network):
    """Return probabilities and classes of the network, its own code, applied once to the whole mirrored scan."""
    logits, head = whole_pass(voxels, image, model_path, network), load_model(model_path).settings.head
    return probabilities_of(logits[None], head)[0].numpy(), classes_of(logits[None], head)[0].numpy()


def whole_pass(voxels, image, model_path, network):
    """Return the network's output, (channels, *spatial)."""
    model = load_model(model_path)
    of = open_image(str(image))
    windows = model.scaling.windows(of.statistics, dtype=of.dtype)
    scaled = np.stack([(c.astype(np.float64) - o) * s for c, (o, s, *_) in zip(voxels, windows, strict=True)])
    rule, shape = model.rule, voxels.shape[-model.rule.ndim :]
    pad = [(h, -n % s + h) for n, s, h in zip(shape, rule.stride, rule.halo, strict=True)]
    pad = [(0, 0)] * (scaled.ndim - rule.ndim) + pad
    x = torch.from_numpy(np.pad(scaled, pad, mode="reflect").astype(np.float32))
    slices = [x[:, z] for z in range(x.shape[1])] if x.ndim > rule.ndim + 1 else [x]
    with torch.no_grad():
        logits = torch.stack([network(each[None])[0] for each in slices], dim=1)
    logits = logits if len(slices) > 1 else logits[:, 0]
    kept = tuple(slice(t, t + n) for n, t in zip(shape, rule.trim, strict=True))
    return logits[(..., *kept)]


CASES = {
    "2-D, any size": (lambda: Encoder(2), (75, 61), (1, 1, 32, 32), True),
    "2-D, one size": (lambda: Encoder(2), (75, 61), (1, 1, 48, 48), False),
    "2-D over a volume": (lambda: Encoder(2, n_classes=1), (3, 40, 37), (1, 1, 32, 32), True),
    "3-D, sigmoid": (lambda: Encoder(3, n_classes=2), (20, 31, 18), (1, 1, 16, 16, 16), True),
    "valid": (lambda: nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.Conv2d(4, 3, 3)), (40, 33), (1, 1, 20, 20), True),
}


@pytest.mark.parametrize(("make", "shape", "example", "dynamic"), CASES.values(), ids=CASES)
def test_tiles_give_what_the_network_gives_on_the_whole_scan(
    tmp_path, capsys, image, make, shape, example, dynamic
):
    voxels, where = image(shape)
    network, model = random_network(make), tmp_path / "model.safetensors"
    path = saved(tmp_path / "network.pt2", network, example, dynamic=dynamic)
    head = ["--head", "sigmoid"] if len(shape) == len(example) - 2 == 3 else []
    told = printed(capsys, "import", path, "--model", model, *head)
    assert told["network"]["source"] == "torch.export program network.pt2"
    likely, classes = expected(voxels[None], where, model, network)
    small = ["--tile", ",".join(str(h * 2 + s) for h, s in zip(told["halo_shape"], told["stride_shape"], strict=True))]
    for name, scheme in {"small": small, "chosen": []}.items():
        done = printed(
            capsys, "segment", where, "--model", model, "--name", name, "--probabilities", "--workers", 1, *scheme
        )
        assert done["certificate"]["n_flipped_decided"] == 0
        got = open_array(Location(str(where)) / f"probabilities/{name}/0")[:]
        assert np.abs(got - likely).max() <= 1e-5
        np.testing.assert_array_equal(open_labels(f"{where}/labels/{name}").array[:], classes)
    assert len(np.unique(classes)) > 1


def test_a_network_of_values_makes_an_image_in_its_own_units(tmp_path, capsys, image):
    voxels, where = image((75, 61))
    network, model = random_network(lambda: nn.Sequential(Encoder(2, n_classes=2), nn.Sigmoid())), tmp_path / "m"
    path = saved(tmp_path / "network.pt2", network, (1, 1, 32, 32), dynamic=True)
    units = ["--output-mean", "-5,100", "--output-std", "2,50"]
    told = printed(capsys, "import", path, "--model", model, "--head", "linear", *units)
    assert (told["network"]["head"], told["classes"]) == ("linear", [])
    done = printed(capsys, "segment", where, "--model", model, "--name", "clean", "--workers", 1)
    assert done["certificate"]["max_difference"] <= 1e-4
    got = open_array(Location(str(where)) / "predictions/clean/0")[:]
    values = whole_pass(voxels[None], where, model, network).numpy()
    np.testing.assert_allclose(got, values * [[[2]], [[50]]] + [[[-5]], [[100]]], atol=1e-3)
    assert np.ptp(got[1]) > 1
    linear = ["import", path, "--model", model, "--head", "linear"]
    assert "--output-std need 2 numbers" in refused(capsys, *linear, "--output-std", "1")
    assert "a model needs 0 class names" in refused(capsys, *linear, "--classes", "a,b")
    assert "need --head linear, got sigmoid" in refused(capsys, "import", path, "--model", model, *units)


@pytest.fixture
def model(tmp_path, capsys):
    path = saved(tmp_path / "network.pt2", random_network(Encoder), (1, 1, 32, 32), dynamic=True)
    printed(capsys, "import", path, "--model", tmp_path / "model.safetensors", "--classes", "none,wall,cell",
            "--normalisation", "percentile")  # fmt: skip
    return tmp_path / "model.safetensors"


def test_every_command_takes_an_imported_model(tmp_path, capsys, image, model):
    told = printed(capsys, "inspect", model)
    assert told["classes"] == ["none", "wall", "cell"]
    assert (told["streams"], told["rule_as_recorded"], told["normalisation"]) == (False, True, "percentile")
    assert told["runs_by_tiles_because"] == "a network from elsewhere"
    of_use = (tensor for name, tensor in Encoder().state_dict().items() if not name.endswith("batches_tracked"))
    assert told["parameters"] == sum(tensor.numel() for tensor in of_use)
    _, where = image((50, 40))
    planned = printed(capsys, "plan", where, "--model", model, "--calibrate")
    assert (planned["scheme"], planned["engine"]) == ("tiles", "reference")
    assert planned["halo_tax"] >= 1
    assert planned["peak_bytes"] <= planned["budget_bytes"]
    printed(capsys, "segment", where, "--model", model, "--name", "a", "--workers", 2)
    verified = printed(capsys, "verify", where, "--name", "a", "--boxes", 3)
    assert verified["n_flipped"] == 0
    printed(capsys, "segment", where, "--model", model, "--name", "b")
    assert tree_digest(where / "labels/a/0") == tree_digest(where / "labels/b/0")


def test_what_only_networks_of_ours_can_do_is_refused(capsys, image, model):
    _, where = image((50, 40))
    for extra in (["--slab", "4"], ["--column", "1"], ["--precision", "bf16"], ["--engine", "fused"]):
        line = refused(capsys, "segment", where, "--model", model, "--name", "a", *extra)
        assert "reference engine runs tiles in float32" in line or "runs as it is written" in line
    assert "tile must be twice the halo" in refused(
        capsys, "segment", where, "--model", model, "--name", "a", "--tile", "15"
    )


def test_what_cannot_be_imported_is_refused_in_one_line(tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    assert "must be a readable file" in refused(capsys, "import", tmp_path / "none.pt2", "--model", out)
    (tmp_path / "text.pt2").write_text("hello")
    assert "undamaged file of torch.export.save" in refused(capsys, "import", tmp_path / "text.pt2", "--model", out)
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2)).eval()
    path = saved(tmp_path / "n.pt2", network, (1, 1, 16, 16), dynamic=True)
    assert "finite receptive field" in refused(capsys, "import", path, "--model", out)
    path = saved(tmp_path / "n.pt2", Encoder().eval(), (1, 1, 16, 16), dynamic=True)
    for option, value, message in (
        ("--classes", "a,b", "needs 3 class names"), ("--channels", "a,b", "channels be 1"),
        ("--normalisation", "best", "must be one of zscore, percentile, range"), ("--mean", "1,2", "need 1 numbers"),
    ):  # fmt: skip
        assert message in refused(capsys, "import", path, "--model", out, option, value)
    assert not out.exists()
