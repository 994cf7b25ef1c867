import json
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save, save_file

from pipeline.errors import ArgumentError, ModelError
from pipeline.geometry.tiles import TileRule
from pipeline.store.scaling import Scaling
from pipeline.store.statistics import Normalisation
from pipeline.unet.model import Model, build, load_model, save_model
from pipeline.unet.network import UNet
from pipeline.unet.settings import UNetSettings, closed_form_rule

SETTINGS = UNetSettings(dims=2, in_channels=2, n_classes=3, width=2, depth=1, batch_norm=True)


def a_model(**change) -> Model:
    torch.manual_seed(3)
    model = Model(
        SETTINGS, ("none", "wall", "cell"), (0, 7, 255), Normalisation.PERCENTILE, ("a", "b"), (0.5, 0.25),
        closed_form_rule(SETTINGS), {"steps": 3, "curve": [0.5, 0.25]}, UNet(SETTINGS).state_dict(),
    )  # fmt: skip
    return replace(model, **change)


def document_of(content: bytes) -> dict:
    return json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["haloseg"])


def test_a_saved_model_is_the_same_when_loaded(tmp_path):
    path = tmp_path / "deep" / "m.safetensors"
    saved = save_model(a_model(), path)
    loaded = load_model(path)
    for name in set(Model.__slots__) - {"weights", "digest"}:
        assert getattr(loaded, name) == getattr(a_model(), name), name
    assert loaded.digest == saved.digest
    assert len(saved.digest) == 64
    assert [f.name for f in path.parent.iterdir()] == ["m.safetensors"]
    assert all(torch.equal(t, a_model().weights[name]) for name, t in loaded.weights.items())


def test_the_same_model_is_the_same_file(tmp_path):
    first, second = save_model(a_model(), tmp_path / "a"), save_model(a_model(), tmp_path / "b")
    assert first.digest == second.digest
    assert save_model(a_model(voxel_size_um=None), tmp_path / "a").digest != first.digest
    assert load_model(tmp_path / "a").voxel_size_um is None


def test_readers_see_a_whole_model_while_it_is_replaced(tmp_path):
    path, errors = tmp_path / "m.safetensors", []
    save_model(a_model(), path)

    def read():
        try:
            for _ in range(30):
                load_model(path)
        except ModelError as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while thread.is_alive():
        save_model(a_model(), path)
    thread.join()
    assert errors == []


def test_a_built_network_infers_and_does_not_learn(tmp_path):
    model = a_model()
    save_model(model, tmp_path / "m")
    network = build(load_model(tmp_path / "m"), "cpu")
    assert not any(m.training for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    x = torch.randn(1, 2, 20, 20)
    reference = UNet(SETTINGS)
    reference.load_state_dict(model.weights)
    reference.to(memory_format=torch.channels_last)
    assert torch.equal(network(x), reference.eval()(x))


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated_files_are_refused(tmp_path, kept):
    path = tmp_path / "m.safetensors"
    save_model(a_model(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"must be an undamaged .safetensors file .*m.safetensors") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_files_of_others_are_refused(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign")
    torch.save({"w": torch.zeros(2)}, tmp_path / "net.pt")
    (tmp_path / "text").write_text("hello, this is not a model at all")
    with pytest.raises(ModelError, match="foreign: it has no haloseg entry"):
        load_model(tmp_path / "foreign")
    for name in ("net.pt", "text"):
        with pytest.raises(ModelError, match=f"{name}: it is truncated or of another kind"):
            load_model(tmp_path / name)
    for name in ("missing", "."):
        with pytest.raises(ModelError, match="must be a readable file"):
            load_model(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 6}, "format 6 is newer than 5"),
        ({"format": "1"}, "no format number"),
        ({"extra": 1}, "entry must have"),
        ({"network": {**SETTINGS.to_json(), "width": 3}}, "tensor .* must be torch.float32 of shape"),
        ({"network": {**SETTINGS.to_json(), "batch_norm": False}}, "must be those of the network"),
        ({"rule": {"stride": [2, 2], "halo": [6, 6], "trim": [0, 0]}}, "must follow from the network"),
        ({"classes": ["a", "b"]}, "needs 3 class names"),
        ({"class_values": [1, 1, 2]}, "class values must differ"),
        ({"channels": ["a"]}, "channels be 2"),
        ({"normalisation": "minmax"}, "minmax"),
        ({"training": 3}, "training record"),
    ],
)
def test_documents_that_do_not_fit_are_refused(tmp_path, change, message):
    path = tmp_path / "m.safetensors"
    save_model(a_model(), path)
    content = path.read_bytes()
    document = {**document_of(content), **change}
    path.write_bytes(save(load(content), {"haloseg": json.dumps(document)}))
    with pytest.raises(ModelError, match=message):
        load_model(path)


def test_a_document_that_lacks_a_field_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(a_model(), path)
    content = path.read_bytes()
    document = document_of(content)
    del document["rule"]
    path.write_bytes(save(load(content), {"haloseg": json.dumps(document)}))
    with pytest.raises(ModelError, match="entry must have"):
        load_model(path)


def test_limits_of_the_normalisation_are_kept_and_files_of_before_have_none(tmp_path):
    about = {"normalisation": Normalisation.WINDOW, "limits": ((-160.0, 240.0), (0.0, 80.0))}
    save_model(a_model(**about), tmp_path / "m")
    assert load_model(tmp_path / "m").scaling == Scaling(Normalisation.WINDOW, about["limits"])
    save_model(a_model(), tmp_path / "before")
    assert "limits" not in document_of((tmp_path / "before").read_bytes())
    assert load_model(tmp_path / "before").scaling == Scaling(Normalisation.PERCENTILE)
    with pytest.raises(ArgumentError, match="limits belong to window"):
        a_model(normalisation=Normalisation.ZSCORE, limits=((0.0, 1.0),))


def test_what_an_older_haloseg_has_no_word_for_has_a_newer_format(tmp_path):
    for how, written in ((Normalisation.ZSCORE, 1), (Normalisation.ZSCORE_SLICEWISE, 3)):
        save_model(a_model(normalisation=how), tmp_path / "m")
        assert document_of((tmp_path / "m").read_bytes())["format"] == written
        assert load_model(tmp_path / "m").normalisation is how


def test_neighbours_are_kept_and_files_of_before_have_none(tmp_path):
    for neighbours, in_channels, written in ((0, 6, 1), (1, 6, 5)):
        settings = replace(SETTINGS, in_channels=in_channels, neighbours=neighbours)
        names = tuple("abcdef"[: settings.image_channels])
        save_model(a_model(settings=settings, channels=names, weights=UNet(settings).state_dict()), tmp_path / "m")
        document = document_of((tmp_path / "m").read_bytes())
        assert (document["format"], document["network"].get("neighbours", 0)) == (written, neighbours)
        assert ("neighbours" in document["network"]) == (neighbours > 0)  # which an older haloseg has no word for
        model = load_model(tmp_path / "m")
        assert (model.settings, len(model.channels)) == (settings, 6 if not neighbours else 2)


def test_a_network_that_sees_several_slices_at_once_has_no_statistics_of_slices():
    volumes = UNetSettings(dims=3, width=2, depth=1)
    with pytest.raises(ArgumentError, match="sees slices one by one, got a 3-D one; use zscore"):
        Model(volumes, ("a", "b"), (0, 1), Normalisation.ZSCORE_SLICEWISE, ("0",), None, closed_form_rule(volumes), {},
              UNet(volumes).state_dict())  # fmt: skip


def test_weights_that_are_not_finite_are_refused():
    weights = {name: t.clone() for name, t in a_model().weights.items()}
    weights["head.weight"][0] = float("nan")
    with pytest.raises(ModelError, match=r"tensor head.weight must be finite"):
        a_model(weights=weights)


def test_a_rule_that_is_not_the_networks_is_refused():
    with pytest.raises(ArgumentError, match="must follow from the network"):
        a_model(rule=TileRule((2, 2), (10, 10), (2, 2)))
