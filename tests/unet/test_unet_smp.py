import io
import json
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from foreign import random_network

from pipeline.cli import main
from pipeline.errors import ArgumentError, ModelError
from pipeline.unet.foreign.smp import smp_program
from pipeline.unet.model import build, load_model


@pytest.fixture
def smp():
    try:
        return import_module("segmentation_models_pytorch")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs segmentation-models-pytorch, pip install 'haloseg[smp]': {error}")


def state_of(network):
    content = io.BytesIO()
    torch.save(network.state_dict(), content)
    return content.getvalue()


@pytest.mark.slow
def test_a_network_of_smp_becomes_a_model_with_its_measured_rule(smp, tmp_path, capsys):
    def make():
        return smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=2, encoder_depth=5)

    network, weights, out = random_network(make), tmp_path / "w.pt", tmp_path / "m.safetensors"
    weights.write_bytes(state_of(network))
    code = main(["import", "smp:Unet", "--encoder", "resnet18", "--weights", str(weights), "--in-channels", "3",
                 "--n-classes", "2", "--model", str(out), "--normalisation", "none", "--mean", "123.7,116.3,103.5",
                 "--std", "58.4,57.1,57.4", "--json"])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert code == 0
    assert told["stride_shape"] == [32, 32]
    assert told["network"]["source"] == "segmentation-models-pytorch Unet, resnet18"
    model, x = load_model(out), torch.rand(1, 3, 96, 160) * 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4]))
    with torch.no_grad():
        expected = network((x - mean) / std)
    np.testing.assert_allclose(build(model, "cpu")(x).numpy(), expected.numpy(), atol=1e-4)


def test_weights_of_another_network_are_refused(smp):
    other = smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=2).state_dict()
    other.pop("segmentation_head.0.weight")
    content = io.BytesIO()
    torch.save(other, content)
    settings = {"encoder": "resnet18", "in_channels": 1, "n_classes": 2}
    with pytest.raises(ModelError, match="must be those of smp:Unet with resnet18"):
        smp_program("Unet", weights=content.getvalue(), **settings)
    with pytest.raises(ModelError, match=r"state dict of torch\.save or safetensors"):
        smp_program("Unet", weights=b"hello", **settings)


def test_networks_that_smp_does_not_have_are_refused(smp):
    with pytest.raises(ArgumentError, match="smp must have the network, got Nonet"):
        smp_program("Nonet", encoder="resnet18", in_channels=1, n_classes=2, weights=None)
    with pytest.raises(ArgumentError, match="must be able to make Unet with none18"):
        smp_program("Unet", encoder="none18", in_channels=1, n_classes=2, weights=None)


def test_without_the_library_and_weights_one_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    cases = {"pip install 'haloseg[smp]'": ["--weights", "random"], "needs --encoder and --weights": []}
    for message, extra in cases.items():
        assert main(["import", "smp:Unet", "--encoder", "resnet18", "--model", str(tmp_path / "m"), *extra]) == 2
        assert message in capsys.readouterr().err
