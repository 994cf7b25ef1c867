"""Networks that see the neighbours of each slice, from the recipe to labels: as one stack of slices, and no other."""

import json
from dataclasses import replace

import numpy as np
import pytest
from volumes import model_file, n_whole, scan_file, tree_digest, whole_scan

from pipeline.cli import main
from pipeline.compute.runner import run_serial
from pipeline.config import EngineName, Scheme, Tta
from pipeline.ensemble import ensemble
from pipeline.errors import ModelError
from pipeline.export import export_bioimageio
from pipeline.ingest import ingest
from pipeline.inspect import inspect
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.store.arrays import open_array
from pipeline.store.image import open_image
from pipeline.store.labels import open_labels
from pipeline.store.location import Location
from pipeline.store.statistics import Normalisation
from pipeline.unet.model import load_model, save_model
from pipeline.unet.settings import Head, Padding, UNetSettings
from pipeline.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")
ONE = UNetSettings(dims=2, in_channels=3, width=2, depth=2, padding=Padding.SAME, neighbours=1)
LAYOUT = {"chunk": (2, 16, 16), "shard": (2, 32, 32)}  # blocks meet between slices, the last ones have one slice
SLICEWISE = {"normalisation": Normalisation.ZSCORE_SLICEWISE}
CASES = {
    "one channel": (ONE, (7, 60, 41), {}),
    "each slice by its own statistics": (ONE, (7, 60, 41), SLICEWISE),
    "two channels": (replace(ONE, in_channels=6), (2, 7, 36, 41), {}),
    "two channels, slicewise": (replace(ONE, in_channels=6, batch_norm=True), (2, 5, 36, 41), SLICEWISE),
    "two on each side, valid": (replace(ONE, in_channels=5, neighbours=2, padding=Padding.VALID), (5, 40, 41), {}),
    "more neighbours than slices": (replace(ONE, in_channels=7, neighbours=3), (2, 40, 41), SLICEWISE),
}  # fmt: skip


def prepared(folder, shape, *, dtype=np.uint16, seed=0, **layout):
    """Write a scan whose slices differ in brightness and contrast, and ingest it; returns (voxels, image)."""
    voxels = scan_file(folder / "scan.tif", shape, seed=seed)
    z = np.arange(shape[-3])[:, None, None]
    voxels = (voxels * (1 + z * 3 % 7) + 40 * (z * 5 % 11)).astype(dtype)
    np.save(folder / "scan.npy", voxels)
    image = str(ingest(str(folder / "scan.npy"), str(folder / "scan.zarr"), **(layout or LAYOUT)).location)
    return voxels.reshape(-1, *shape[-3:]), image


def array_of(image, path):
    return np.asarray(open_array(Location(image) / path)[:])


@pytest.mark.parametrize(("settings", "shape", "about"), CASES.values(), ids=CASES)
def test_labels_and_probabilities_are_those_of_whole_slices_and_their_neighbours(tmp_path, settings, shape, about):
    voxels, image = prepared(tmp_path, shape)
    model = model_file(tmp_path / "model.safetensors", settings, **about)
    expected = whole_scan(voxels, model, open_image(image).statistics)
    tile = load_model(model).rule.tile_shape((12, 8))
    schemes = {
        "columns": Scheme(), "thin": Scheme(slab=4, column=(1, 1, 1)), "wide": Scheme(slab=8, column=(3, 2, 1)),
        "tiles": Scheme(tile=tile), "few": Scheme(tile=tile, budget_bytes=900_000),
        "reference": Scheme(engine=EngineName.REFERENCE),
    }  # fmt: skip
    for name, scheme in schemes.items():
        plan = plan_segment(image, model=model, name=name, scheme=scheme, probabilities=True)
        done = segment(plan, run=run_serial)
        likely = array_of(image, f"probabilities/{name}/0")
        assert np.abs(likely - expected).max() <= 1e-5
        np.testing.assert_array_equal(open_labels(f"{image}/labels/{name}").array[:], expected.argmax(axis=0))
        assert done.certificate is None or done.certificate["max_difference"] <= 1e-5
        assert done.n_voxels_read * len(voxels) * voxels.itemsize == plan.bytes_read
    certificate = verify(image, name="thin", run=run_serial, n_boxes=12)
    assert certificate.n_flipped == 0
    assert certificate.max_difference <= 1e-5
    if shape[-3] > 2:  # two slices have the same neighbours above and below
        upside_down = whole_scan(np.ascontiguousarray(voxels[:, ::-1]), model, open_image(image).statistics)[:, ::-1]
        assert np.abs(upside_down - expected).max() > 1e-2


def test_each_slab_is_read_once(tmp_path):
    voxels, image = prepared(tmp_path, (12, 60, 41), chunk=(4, 16, 16), shard=(4, 32, 32))
    model = model_file(tmp_path / "m", ONE)

    # all of the scan at once, or of columns of four slices five, six and five, though each slice is seen three times
    for n_shards, n_read in ((3, voxels.size), (1, 16 * 60 * 41)):
        scheme = Scheme(slab=4, column=(n_shards, 2, 2))
        plan = plan_segment(image, model=model, name=f"by-{n_shards}", scheme=scheme)
        assert segment(plan, run=run_serial).n_voxels_read == n_read


def test_a_plan_counts_the_neighbours(tmp_path):
    _, image = prepared(tmp_path, (12, 64, 64), chunk=(4, 16, 16), shard=(4, 32, 32))
    alone = model_file(tmp_path / "alone", replace(ONE, in_channels=1, neighbours=0))
    with_neighbours = model_file(tmp_path / "m", ONE)
    for scheme in (Scheme(column=(1, 2, 2)), Scheme(tile=(80, 80))):  # tiles that are a block's
        one, other = (plan_segment(image, model=m, name="x", scheme=scheme) for m in (alone, with_neighbours))
        assert other.bytes_read * 12 == one.bytes_read * 16
        assert other.rule.halo == (1, *one.rule.halo[1:])
        assert other.peak_bytes > one.peak_bytes
        first = 3 * 3 * 2 * (3 - 1)  # multiplications of two more channels, in the first convolution
        n_first = (other.multiply_adds - one.multiply_adds) / first  # voxels that it is made for, halos included
        assert 12 * 64 * 64 <= n_first <= 12 * 4 * 80 * 80
    assert n_first == 12 * 4 * 80 * 80


@pytest.mark.parametrize("tiles", [{}, {"tile": (64, 64)}])
def test_flips_and_several_networks_are_averaged(tmp_path, tiles):
    shape = (5, 48, 40)
    voxels, image = prepared(tmp_path, shape)
    members = [model_file(tmp_path / f"{seed}.safetensors", ONE, seed=seed) for seed in range(2)]
    both = tmp_path / "both.safetensors"
    save_model(ensemble(members), both)
    turned = [
        np.flip(whole_scan(np.flip(voxels, axes), each, open_image(image).statistics), axes)
        for each in members for axes in ((), (2,), (3,), (2, 3))
    ]  # fmt: skip
    scheme = Scheme(tta=Tta.FLIPS, **tiles)
    segment(plan_segment(image, model=str(both), name="x", scheme=scheme, probabilities=True), run=run_serial)
    assert np.abs(array_of(image, "probabilities/x/0") - np.mean(turned, axis=0)).max() <= 1e-5
    other = model_file(tmp_path / "other.safetensors", replace(ONE, neighbours=0))
    with pytest.raises(ModelError, match=r"must differ in their weights alone, got neighbours 1 and 0; channels \(0\)"):
        ensemble([members[0], other])


def test_values_are_those_of_whole_slices(tmp_path):
    window = ((50.0, 0.1),)
    about = {"target_windows": window, "input_windows": ((300.0, 0.004),)}
    voxels, image = prepared(tmp_path, (5, 40, 41))
    model = model_file(tmp_path / "m", replace(ONE, head=Head.LINEAR, n_classes=1), **about)
    expected = whole_scan(voxels, model, None) * 10 + 50
    for name, scheme in {"columns": Scheme(column=(1, 1, 2)), "tiles": Scheme(tile=(64, 64))}.items():
        segment(plan_segment(image, model=model, name=name, scheme=scheme), run=run_serial)
        assert np.abs(array_of(image, f"predictions/{name}/0") - expected).max() <= 1e-3


def test_a_run_that_lacks_shards_goes_on_to_the_same_bytes(tmp_path):
    _, image = prepared(tmp_path, (7, 60, 41))
    plan = plan_segment(image, model=model_file(tmp_path / "m", ONE), name="x", scheme=Scheme(column=(2, 2, 2)))
    segment(plan, run=run_serial)
    expected, n_shards = tree_digest(f"{image}/labels/x"), n_whole(plan.labels.location / "0/c")
    for position in ("1/0/0", "1/1/1", "3/0/1"):
        (plan.labels.location / f"0/c/{position}").delete()
    done = segment(plan_segment(image, model=plan.model_path, name="x", scheme=Scheme()), run=run_serial)
    assert (done.n_run, n_whole(plan.labels.location / "0/c")) == (3, n_shards)
    assert tree_digest(f"{image}/labels/x") == expected


def test_what_has_no_neighbours_is_refused_in_one_line(tmp_path, capsys):
    model = model_file(tmp_path / "m.safetensors", ONE)
    scan_file(tmp_path / "picture.tif", (40, 41))
    assert main(["segment", str(tmp_path / "picture.tif"), "--model", model, "--name", "x"]) == 2
    told = capsys.readouterr().err.strip()
    assert "a 2-D network that sees 1 slices on each side needs a volume, got a scan with 2 spatial axes" in told
    assert "\n" not in told
    assert not (tmp_path / "picture.zarr").exists()
    _, image = prepared(tmp_path, (2, 3, 20, 21))
    with pytest.raises(ModelError, match="must have the network's 1 channels, got 2"):
        plan_segment(image, model=model, name="x")
    with pytest.raises(ModelError, match="of a network that sees one slice at a time, got 1 neighbours on each side"):
        export_bioimageio(model, str(tmp_path / "m.zip"), authors=("A",), licence="MIT")
    assert not (tmp_path / "m.zip").exists()


def test_inspect_and_plan_tell_of_the_neighbours(tmp_path, capsys):
    _, image = prepared(tmp_path, (5, 40, 41))
    model = model_file(tmp_path / "m.safetensors", ONE)
    told = inspect(model)
    assert (told["kind"], told["network"]["neighbours"]) == ("2-D U-Net with neighbouring slices", 1)
    assert told["rule_as_recorded"]
    assert main(["plan", image, "--model", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["halo_shape"][0] == 1


def test_slices_that_lie_further_apart_than_those_learnt_from_are_told_of(tmp_path, caplog):
    _, image = prepared(tmp_path, (5, 40, 41), voxel_size_um=(0.1, 0.004, 0.004))
    for settings, is_told in ((ONE, True), (replace(ONE, in_channels=1, neighbours=0), False)):
        caplog.clear()
        model = model_file(tmp_path / "m", settings, voxel_size_um=(0.05, 0.004, 0.004))
        plan_segment(image, model=model, name="x")
        assert ("the model was trained at (0.05, 0.004, 0.004) um per voxel" in caplog.text) == is_told
