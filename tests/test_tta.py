"""Test-time augmentation from the command line to the labels: the mean over turned whole scans, in every way to run."""

from itertools import product

import numpy as np
import pytest
from foreign import Encoder, random_network, saved
from volumes import model_file, scan_file, tree_digest, whole_scan

from pipeline.archive import Archive, State, survey
from pipeline.cli import main
from pipeline.compute.runner import run_serial
from pipeline.config import EngineName, Scheme, Tta
from pipeline.errors import StoreError
from pipeline.ingest import ingest
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.store.arrays import open_array
from pipeline.store.image import open_image
from pipeline.store.labels import open_labels
from pipeline.unet.settings import Padding, UNetSettings, closed_form_rule
from pipeline.verify import verify

FLAT = UNetSettings(dims=2, width=3, depth=2, n_classes=3, padding=Padding.SAME, batch_norm=True)
DEEP = UNetSettings(dims=3, width=2, depth=1, padding=Padding.VALID)
CASES = {  # whole strides, so that the poolings of a turned scan are those of the scan
    "2-D": ((72, 44), FLAT, Tta.ROTATIONS), "slices of a volume": ((3, 40, 44), FLAT, Tta.FLIPS),
    "3-D": ((6, 20, 12), DEEP, Tta.FLIPS), "3-D rotations": ((4, 12, 18), DEEP, Tta.ROTATIONS),
}  # fmt: skip


def prepared(tmp_path, shape):
    voxels = scan_file(tmp_path / "scan.tif", shape)
    n = len(shape)
    ingest(str(tmp_path / "scan.tif"), str(tmp_path / "scan.zarr"), chunk=(16,) * n, shard=(16,) * n)
    return voxels, str(tmp_path / "scan.zarr")


def averaged(voxels, model, statistics, tta, *, dims):
    """Return the mean of what the network says of the whole scan, turned by NumPy, turned back."""
    every = []
    for flips in product((False, True), repeat=dims):
        axes = tuple(at - dims for at, each in enumerate(flips) if each)
        for k in range(1 + (tta is Tta.ROTATIONS)):
            seen = np.rot90(np.flip(voxels[None], axes), k, (-2, -1)).copy()
            every.append(np.flip(np.rot90(whole_scan(seen, model, statistics), -k, (-2, -1)), axes))
    return np.mean(every, axis=0, dtype=np.float64)


@pytest.mark.parametrize(("shape", "settings", "tta"), CASES.values(), ids=CASES)
def test_labels_are_the_mean_over_turned_whole_scans_however_they_are_made(tmp_path, shape, settings, tta):
    voxels, image = prepared(tmp_path, shape)
    model, rule = model_file(tmp_path / "model.safetensors", settings), closed_form_rule(settings)
    expected = averaged(voxels, model, open_image(image).statistics, tta, dims=settings.dims)
    schemes = {
        "columns": {}, "thin": {"slab": settings.stride, "column": (1,) * len(shape)},
        "tiles": {"tile": rule.tile_shape(rule.stride)}, "reference": {"engine": EngineName.REFERENCE},
    }  # fmt: skip
    for name, how in schemes.items():
        scheme = Scheme(tta=tta, **how)
        done = segment(plan_segment(image, model=model, name=name, scheme=scheme, probabilities=True), run=run_serial)
        likely = open_image(image).location / "probabilities" / name / "0"
        assert np.abs(open_array(likely)[:] - expected).max() <= 1e-5
        np.testing.assert_array_equal(open_labels(f"{image}/labels/{name}").array[:], expected.argmax(axis=0))
        assert done.certificate["max_difference"] <= 1e-5
        assert done.certificate["n_flipped_decided"] == 0
    alone = whole_scan(voxels[None], model, open_image(image).statistics)
    assert (alone.argmax(0) != expected.argmax(0)).any()


def test_a_network_from_elsewhere_sees_turned_tiles(tmp_path):
    voxels, image = prepared(tmp_path, (72, 44))
    program = saved(tmp_path / "net.pt2", random_network(Encoder), (1, 1, 64, 64), dynamic=True)
    model = str(tmp_path / "net.safetensors")
    assert main(["import", str(program), "--model", model, "--normalisation", "zscore"]) == 0
    expected = averaged(voxels, model, open_image(image).statistics, Tta.ROTATIONS, dims=2)
    plan = plan_segment(image, model=model, name="x", scheme=Scheme(tta=Tta.ROTATIONS), probabilities=True)
    done = segment(plan, run=run_serial)
    assert np.abs(open_array(plan.probabilities.location / "0")[:] - expected).max() <= 1e-5
    assert done.certificate["max_difference"] <= 1e-5


def test_it_is_part_of_what_labels_are_known_by(tmp_path, capsys):
    _, image = prepared(tmp_path, (72, 44))
    model = model_file(tmp_path / "model.safetensors", FLAT)
    command = ["segment", image, "--model", model, "--workers", "1"]
    assert main([*command, "--name", "x", "--tta", "flips"]) == 0
    labels = open_labels(f"{image}/labels/x")
    assert (labels.fingerprint["tta"], labels.provenance["tta"]) == ("flips", "flips")
    with pytest.raises(StoreError, match=r"got another tta \(None, was flips\)"):
        plan_segment(image, model=model, name="x")
    before = tree_digest(image)
    again = segment(plan_segment(image, model=model, name="x", scheme=Scheme(tta=Tta.FLIPS)), run=run_serial)
    assert (again.n_run, tree_digest(image)) == (0, before)
    assert verify(image, name="x", run=run_serial).max_difference <= 1e-5
    assert main([*command, "--name", "y"]) == 0
    assert "tta" not in open_labels(f"{image}/labels/y").fingerprint  # as it was before there was such a thing
    archive = Archive(str(tmp_path), model, pattern="scan.tif", name="x", settle_s=0, tta=Tta.FLIPS)
    assert survey(archive).scans[0].state is State.DONE
    other = Archive(str(tmp_path), model, pattern="scan.tif", name="x", settle_s=0)
    assert survey(other).scans[0].detail.startswith("labels x are of another tta; choose another name or delete ")


def test_the_plan_counts_the_passes_and_their_memory(tmp_path):
    _, image = prepared(tmp_path, (72, 44))
    model = model_file(tmp_path / "model.safetensors", FLAT)
    for how in ({}, {"engine": EngineName.REFERENCE}, {"tile": (68, 68)}):
        plans = [plan_segment(image, model=model, name="x", scheme=Scheme(tta=tta, **how)) for tta in Tta]
        assert [plan.multiply_adds / plans[0].multiply_adds for plan in plans] == [1, 4, 8]
        assert plans[0].halo_tax == pytest.approx(plans[2].halo_tax)
        assert plans[0].peak_bytes < plans[1].peak_bytes <= plans[2].peak_bytes


def test_a_run_that_stops_goes_on_and_ends_in_the_same_bytes(tmp_path):
    _, image = prepared(tmp_path, (10, 32, 20))
    model, scheme = model_file(tmp_path / "model.safetensors", DEEP), Scheme(tta=Tta.FLIPS, slab=2, column=(1, 2, 2))
    segment(plan_segment(image, model=model, name="whole", scheme=scheme), run=run_serial)
    plan = plan_segment(image, model=model, name="part", scheme=scheme)
    segment(plan, run=run_serial)
    (plan.labels.location / "0/c/0/1/1").delete()
    assert segment(plan_segment(image, model=model, name="part", scheme=scheme), run=run_serial).n_run == 1
    assert tree_digest(f"{image}/labels/part/0") == tree_digest(f"{image}/labels/whole/0")


def test_rotations_are_refused_in_one_line_where_y_and_x_differ(tmp_path, capsys):
    _, image = prepared(tmp_path, (72, 44))
    thin = UNetSettings(dims=2, width=2, depth=2, padding=Padding.SAME, poolings=((1, 2), (2, 2)))
    model, before = model_file(tmp_path / "model.safetensors", thin), tree_digest(image)
    assert main(["segment", image, "--model", model, "--name", "x", "--tta", "rotations"]) == 2
    assert "rotations need a network that treats y and x alike" in capsys.readouterr().err
    assert tree_digest(image) == before
    assert main(["segment", image, "--model", model, "--name", "x", "--tta", "flips", "--workers", "1"]) == 0
    tall, model = str(tmp_path / "tall.zarr"), model_file(tmp_path / "square.safetensors", FLAT)
    ingest(str(tmp_path / "scan.tif"), tall, voxel_size_um=(0.6, 0.5))
    assert main(["segment", tall, "--model", model, "--name", "x", "--tta", "rotations"]) == 2
    assert "rotations need voxels as long along y as along x, got 0.6 and 0.5 um" in capsys.readouterr().err
