import io
import json
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch
from foreign import Encoder, random_network, saved
from peaks import each_measured
from torch import nn
from torch.nn import functional

from pipeline.errors import ArgumentError, ModelError
from pipeline.geometry.tiles import TileRule
from pipeline.unet.foreign.adopt import Description, adopt, measured_again
from pipeline.unet.foreign.appraisal import foreign_bare_multiply_adds, foreign_multiply_adds
from pipeline.unet.foreign.program import Program
from pipeline.unet.foreign.pt2 import read_pt2
from pipeline.unet.memory import choose_tile, peak_bytes
from pipeline.unet.model import build, load_model, save_model
from pipeline.unet.settings import Head

ABOUT = Description("a test")


def exported(tmp_path, network, shape=(1, 1, 32, 32), *, dynamic=True, output=0):
    return read_pt2((tmp_path / saved(tmp_path / "n.pt2", network, shape, dynamic=dynamic)).read_bytes(), output=output)


def logits(network, x):
    with torch.no_grad():
        return network(x)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("dims", [2, 3])
def test_an_adopted_program_gives_the_networks_own_numbers(tmp_path, dims, dynamic):
    network, shape = random_network(lambda: Encoder(dims, 2)), (1, 2, *(20,) * dims)
    model = adopt(exported(tmp_path, network, shape, dynamic=dynamic), ABOUT)
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.settings == model.settings
    assert again.rule == model.rule
    x = torch.randn(shape)
    torch.testing.assert_close(build(again, "cpu")(x), logits(network, x), atol=1e-5, rtol=0)
    assert measured_again(build(again, "cpu")) == model.rule


def test_a_program_of_one_size_that_holds_no_size_takes_every_size(tmp_path):
    def make():
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2))

    network = random_network(make)
    model = adopt(exported(tmp_path, network, dynamic=False), ABOUT)
    assert (model.settings.tile, model.rule) == ((), TileRule((2, 2), (2, 2), (2, 2)))
    x = torch.randn(3, 1, 50, 22)
    torch.testing.assert_close(build(model, "cpu")(x), logits(network, x), atol=1e-5, rtol=0)


def test_a_program_of_one_size_has_that_tile_alone(tmp_path):
    network = random_network(Encoder)
    model = adopt(exported(tmp_path, network, (1, 1, 48, 46), dynamic=False), ABOUT)
    assert model.settings.tile == (48, 46) == model.rule.tile_shape(model.rule.stride)
    assert model.rule.stride == (32, 32)
    assert choose_tile(model, budget_bytes=2**30, largest_core=(512, 512)) == (48, 46)
    with pytest.raises(ArgumentError, match="must accept tiles of"):
        peak_bytes(model.settings, (64, 64))
    # the core that a tile leaves is what the network, of any size, gives on the whole
    hy, hx = model.rule.halo
    x = torch.randn(1, 1, 96 + 2 * hy, 96 + 2 * hx)
    whole, part = logits(network, x), build(model, "cpu")(x[..., 32 : 32 + 48, 32 : 32 + 46])
    torch.testing.assert_close(
        part[..., hy : hy + 32, hx : hx + 32], whole[..., hy + 32 : hy + 64, hx + 32 : hx + 64], atol=1e-5, rtol=0
    )


class Positioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.linspace(0, 1, 24 * 24).reshape(1, 1, 24, 24))
        self.last = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x):
        return self.last(x + self.at)


def test_a_program_of_one_size_that_knows_the_position_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"takes 24 voxels along axis 0 only must .*one input NaN at a time"):
        adopt(exported(tmp_path, Positioned(), (1, 1, 24, 24), dynamic=False), ABOUT)


@pytest.mark.parametrize("end", [nn.InstanceNorm2d, lambda _: Squeeze()], ids=["InstanceNorm", "squeeze"])
def test_a_program_that_sees_everything_is_refused_and_told_how_it_was_measured(tmp_path, end):
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), end(2)).eval()
    with pytest.raises(ModelError, match=r"finite receptive field .* set to NaN, reaches the border .*frozen stat"):
        adopt(exported(tmp_path, network), ABOUT)


class Squeeze(nn.Module):
    def forward(self, x):
        return x * functional.adaptive_avg_pool2d(x, 1).sigmoid()


@pytest.mark.parametrize(
    ("end", "head"), [(lambda: nn.Softmax(1), Head.SOFTMAX), (nn.Sigmoid, Head.SIGMOID), (nn.Identity, Head.SOFTMAX)]
)
def test_the_activation_at_the_end_becomes_the_head(tmp_path, end, head):
    network, x = random_network(lambda: Encoder(end=end)), torch.randn(1, 1, 16, 16)
    model = adopt(exported(tmp_path, network), ABOUT)
    assert model.settings.head is head
    inner, network.end = network.end, nn.Identity()
    torch.testing.assert_close(build(model, "cpu")(x), logits(network, x), atol=1e-5, rtol=0)
    if not isinstance(inner, nn.Identity):
        other = Head.SIGMOID if head is Head.SOFTMAX else Head.SOFTMAX
        network.end = inner
        with pytest.raises(ArgumentError, match="head must be the program's own"):
            adopt(exported(tmp_path, network), replace(ABOUT, head=other))


def test_mean_and_deviation_are_part_of_the_network(tmp_path):
    network, x = random_network(lambda: Encoder(2, 2)), torch.rand(1, 2, 16, 16)
    model = adopt(exported(tmp_path, network, (1, 2, 16, 16)), replace(ABOUT, mean=(0.4, 0.6), std=(0.25, 2.0)))
    scaled = (x - torch.tensor([0.4, 0.6]).view(2, 1, 1)) / torch.tensor([0.25, 2.0]).view(2, 1, 1)
    torch.testing.assert_close(build(model, "cpu")(x), logits(network, scaled), atol=1e-5, rtol=0)
    with pytest.raises(ArgumentError, match="need 2 numbers, deviations above 0"):
        adopt(exported(tmp_path, network, (1, 2, 16, 16)), replace(ABOUT, std=(1.0, 0.0)))


def test_one_of_several_outputs_is_taken(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 3, 1)

        def forward(self, x):
            return self.a(x), self.b(x)

    model = adopt(exported(tmp_path, Two(), output=1), ABOUT)
    assert (model.settings.n_classes, model.rule.halo) == (3, (0, 0))
    assert not any(name.startswith("weights.a") for name in model.weights)
    with pytest.raises(ModelError, match="output asked for, got 2 of 2"):
        exported(tmp_path, Two(), output=2)


class Learning(nn.Sequential):
    pass


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(2), nn.Dropout(0.5)], ids=["BatchNorm", "dropout"])
def test_a_program_that_learns_is_refused(tmp_path, layer):
    network = Learning(nn.Conv2d(1, 2, 1), layer).train()
    with pytest.raises(ModelError, match=r"call eval\(\) before torch.export"):
        adopt(exported(tmp_path, network), ABOUT)


def test_counts_are_those_of_a_convolution(tmp_path):
    settings = adopt(exported(tmp_path, nn.Conv2d(1, 4, 3, padding=1)), ABOUT).settings
    assert foreign_multiply_adds(settings, (20, 30)) == 4 * 9 * 600
    assert foreign_bare_multiply_adds(settings, (7, 20, 30)) == 7 * 4 * 9 * 600
    n = 1000 * 1000
    assert peak_bytes(settings, (1000, 1000)) >= 4 * n * (1 + 4)
    assert peak_bytes(settings, (1000, 1000), n_slices=4) >= 4 * 4 * n * (1 + 4)


MEASURE = """
import json, sys
import numpy as np
from peaks import grown
from pipeline.geometry.box import Box
from pipeline.unet.engines import keep_freed_memory
from pipeline.unet.model import build, load_model
from pipeline.unet.predict import Predictor

def measure(path, tile):
    model = load_model(path)
    keep_freed_memory()
    predictor = Predictor(build(model, "cpu"), model.rule, windows=((0.0, 1.0),), tile_shape=tile, device="cpu")
    def run(shape):
        predictor.segment(np.ones((1, *shape), np.uint8), Box.whole(model.rule.core_shape(tuple(shape))))
    run(model.rule.tile_shape(model.rule.stride))
    return grown(lambda: run(tile))
"""


@pytest.mark.slow
def test_predicted_peak_bounds_the_measured_one(tmp_path):
    network = nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 2, 1)
    )
    model = adopt(exported(tmp_path, network), ABOUT)
    save_model(model, tmp_path / "m")
    tile = (1000, 1000)
    (grown,) = each_measured(MEASURE, [[str(tmp_path / "m"), tile]])
    assert 0.35 < grown / peak_bytes(model.settings, tile) < 1  # 0.58 to 0.82 for five networks, 2-D and 3-D


def test_a_program_is_the_same_from_its_json():
    program = Program.from_json({"input": "x", "output": "y", "state": [["w", "a.w"]], "calls": [
        ["aten.mul.Tensor", [{"value": "x"}, {"value": "w"}], {}, ["y"], False],
    ]})  # fmt: skip
    assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program
    with pytest.raises(ModelError, match="must be one that haloseg import wrote"):
        Program.from_json({"input": "x"})


def rewritten(path, change):
    """Return the bytes of a .pt2 file of which ``change(name, content)`` gives the files anew."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
    return out.getvalue()


class Bomb:
    def __reduce__(self):
        return (exit, ("unpickled",))


def hostile(path, name, edit):
    def change(at, content):
        if at != name:
            return content
        document = json.loads(content)
        edit(document)
        return json.dumps(document).encode()

    return rewritten(path, change)


def call(name):
    def edit(document):
        document["graph_module"]["graph"]["nodes"][0]["target"] = name

    return edit


def test_nothing_in_a_file_is_unpickled_or_evaluated(tmp_path):
    path = saved(tmp_path / "n.pt2", nn.Conv2d(1, 2, 3), (1, 1, 8, 8), dynamic=True)
    bomb = rewritten(path, lambda at, content: pickle.dumps(Bomb()) if at.startswith("data/sample") else content)
    assert adopt(read_pt2(bomb), ABOUT).rule.halo == (1, 1)  # torch.export.load would have run it

    def formula(document):
        for each in document["graph_module"]["graph"]["tensor_values"].values():
            for size in each["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = "__import__('os').abort()"

    assert read_pt2(hostile(path, "models/model.json", formula)).input_shape == (1, 1, 8, 8)

    def pickled(document):
        document["config"]["weight"]["use_pickle"] = True

    with pytest.raises(ModelError, match="no pickle is ever loaded, got weight as one"):
        read_pt2(hostile(path, "data/weights/model_weights_config.json", pickled))


@pytest.mark.parametrize(
    "name", ["torch.os.system", "torch.ops.aten.from_file.default", "torch.ops.aten.save.default", "_operator.call",
             "torch.ops.aten.__class__.mro", "torch.ops.prim.Print.default", "torch.hub.load"]
)  # fmt: skip
def test_a_program_calls_tensor_operators_only(tmp_path, name):
    path = saved(tmp_path / "n.pt2", nn.Conv2d(1, 2, 3), (1, 1, 8, 8), dynamic=True)
    with pytest.raises(ModelError, match=r"may call tensor operators|has no operator"):
        adopt(read_pt2(hostile(path, "models/model.json", call(name))), ABOUT)


def test_files_that_are_no_programs_are_refused(tmp_path):
    path = saved(tmp_path / "n.pt2", nn.Conv2d(1, 2, 3), (1, 1, 8, 8), dynamic=True)
    whole = (tmp_path / "n.pt2").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        with pytest.raises(ModelError, match=r"undamaged file of torch\.export\.save"):
            read_pt2(content)

    def newer(document):
        document["schema_version"]["major"] = 9

    with pytest.raises(ModelError, match="must be of schema 8, got 9"):
        read_pt2(hostile(path, "models/model.json", newer))
    two = torch.export.export(Sum(), (torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)))
    torch.export.save(two, tmp_path / "two.pt2")
    with pytest.raises(ModelError, match="must take one image, got 2 inputs"):
        read_pt2((tmp_path / "two.pt2").read_bytes())
    with pytest.raises(ModelError, match=r"must take \(batch, channels, \*spatial\)"):
        adopt(exported(tmp_path, nn.Linear(4, 4), (3, 4), dynamic=False), ABOUT)
    with pytest.raises(ModelError, match=r"return logits .* without argmax"):
        adopt(exported(tmp_path, ArgMax()), ABOUT)


class Sum(nn.Module):
    def forward(self, x, y):
        return x + y


class ArgMax(nn.Module):
    def forward(self, x):
        return x.argmax(dim=1, keepdim=True)


def test_weights_of_another_program_are_refused(tmp_path):
    model = adopt(exported(tmp_path, nn.Conv2d(1, 2, 3)), ABOUT)
    with pytest.raises(ModelError, match="must be those of the program"):
        replace(model, weights={"graph": model.weights["graph"]})
    bad = {**model.weights, "weights.bias": torch.full((2,), torch.nan)}
    with pytest.raises(ModelError, match=r"weights\.bias must be finite"):
        replace(model, weights=bad)
