import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from instances import add_labels, checkerboard, class_labels, snake, whole
from ome_zarr_models.v05 import Image as OmeImage
from peaks import each_measured
from volumes import model_file, n_whole, scan_file, tree_digest

from pipeline.cli import main
from pipeline.compute.cluster import open_runner
from pipeline.compute.runner import run_serial
from pipeline.errors import ArgumentError, QuarantineError, RunError, StoreError
from pipeline.ingest import ingest_labels
from pipeline.stitch import stitch
from pipeline.store.image import open_image
from pipeline.store.labels import open_labels, published
from pipeline.store.location import Location
from pipeline.store.pyramid import Downsampling, downsample
from pipeline.unet.settings import Head, Padding, UNetSettings
from pipeline.works.components import ComponentBlocks, InstanceBlocks


def mixed(shape, *, seed=0, n_classes=3):
    """Return classes that lie in lumps, at random."""
    noise = np.random.default_rng(seed).normal(size=shape)
    for axis in range(len(shape)):
        noise = noise + np.roll(noise, 1, axis)
    return np.digitize(noise, np.quantile(noise, np.arange(1, n_classes) / n_classes)).astype(np.uint8)


CASES = {
    "2-D, 3 classes": (mixed((37, 53)), (8, 16)), "3-D, 3 classes": (mixed((13, 22, 31)), (4, 8, 16)),
    "one block": (mixed((9, 10, 11)), (16, 16, 16)), "snake": (snake((9, 9, 9)), (4, 4, 4)),
    "checkerboard": (checkerboard((13, 15)), (4, 4)), "one class": (np.ones((9, 10, 11), np.uint8), (4, 4, 4)),
    "nothing": (np.zeros((9, 10, 11), np.uint8), (4, 4, 4)), "one voxel": (np.ones((1, 1), np.uint8), (16, 16)),
    "slices": (mixed((5, 17, 18), n_classes=2), (1, 16, 16)),
}  # fmt: skip


@pytest.mark.parametrize(("voxels", "block"), CASES.values(), ids=CASES)
def test_instances_are_the_components_of_the_whole_volume(tmp_path, voxels, block):
    image = class_labels(tmp_path, voxels, block=block, classes=("background", "nucleus", "cell"))
    for min_voxels in (1, 7):
        done = stitch(image, labels="cells", name=f"at-least-{min_voxels}", min_voxels=min_voxels)
        expected = whole(voxels, (1, 2), min_voxels=min_voxels)
        found = open_labels(f"{image}/labels/at-least-{min_voxels}")
        assert (found.dtype, found.array.dtype) == ("uint64", np.uint64)
        np.testing.assert_array_equal(found.array[:], expected)
        assert done.n_instances == found.provenance["instances"] == expected.max()
        assert found.provenance["classes"] == ["nucleus", "cell"]
    assert published(Location(image) / "labels") == ["at-least-1", "at-least-7", "cells"]


def test_the_volume_is_an_ome_zarr_with_a_pyramid_of_modes_and_nothing_else(tmp_path):
    voxels = mixed((300, 290))
    image = class_labels(tmp_path, voxels, block=128)
    stitch(image, labels="cells", name="nuclei")
    folder = Path(image) / "labels" / "nuclei"
    OmeImage.from_zarr(zarr.open_group(folder, mode="r"))
    assert sorted(each.name for each in folder.iterdir()) == ["0", "1", "zarr.json"]
    lower = zarr.open_array(folder / "1", mode="r")
    assert lower.dtype == np.uint64
    np.testing.assert_array_equal(lower[:], downsample(whole(voxels, (1, 2)), (2, 2), Downsampling.MODE))
    about = json.loads((folder / "zarr.json").read_text())["attributes"]
    assert about["ome"]["image-label"] == {"source": {"image": "../../"}}
    assert about["haloseg"]["provenance"]["labels"] == "cells"


def test_classes_are_told_by_name_or_value_and_of_ingested_labels_found_in_the_voxels(tmp_path):
    voxels = mixed((20, 30), n_classes=3)
    image = class_labels(tmp_path, voxels, block=16, classes=("background", "nucleus", "cell"))
    for name, classes, values in (("a", ("cell",), (2,)), ("b", ("0", "nucleus"), (0, 1)), ("c", (), (1, 2))):
        stitch(image, labels="cells", name=name, classes=classes)
        np.testing.assert_array_equal(open_labels(f"{image}/labels/{name}").array[:], whole(voxels, values))
    signed = voxels.astype(np.int16) * 300 - 300  # -300, 0, 300
    np.save(tmp_path / "signed.npy", signed)
    ingest_labels(str(tmp_path / "signed.npy"), image=image, name="signed")
    for name, classes, values in (("d", (), (0, 300)), ("e", ("-300",), (-300,))):
        stitch(image, labels="signed", name=name, classes=classes)
        np.testing.assert_array_equal(open_labels(f"{image}/labels/{name}").array[:], whole(signed, values))


def test_labels_without_names_that_hold_one_value_have_objects_only_if_it_is_named(tmp_path):
    image = class_labels(tmp_path, np.zeros((9, 10), np.uint8), block=16, name="empty")
    add_labels(open_image(Location(image)), np.full((9, 10), 5, np.uint8), name="full")
    assert stitch(image, labels="empty", name="a").n_instances == 0
    with pytest.raises(ArgumentError, match="got 5 alone; name classes"):
        stitch(image, labels="full", name="b")
    assert stitch(image, labels="full", name="b", classes=("5",)).n_instances == 1


class Stopping:
    """A runner that is interrupted after some blocks of one kind of work."""

    def __init__(self, kind, n_blocks):
        self.kind, self.n_blocks = kind, n_blocks

    def __call__(self, work, indices, *, on_record):
        if not isinstance(work, self.kind):
            return run_serial(work, indices, on_record=on_record)
        run_serial(work, list(indices)[: self.n_blocks], on_record=on_record)
        raise KeyboardInterrupt


def test_a_run_that_stops_anywhere_goes_on_and_ends_in_the_same_bytes(tmp_path):
    voxels = mixed((13, 22, 31))
    image = class_labels(tmp_path, voxels, block=8)
    stitch(image, labels="cells", name="undisturbed", min_voxels=3)
    expected = digest_but_name(image, "undisturbed")
    for at, (kind, n) in enumerate([(k, n) for k in (ComponentBlocks, InstanceBlocks) for n in (0, 1, 12, 23)]):
        name = f"stopped-{at}"
        with pytest.raises(KeyboardInterrupt):
            stitch(image, labels="cells", name=name, min_voxels=3, run=Stopping(kind, n))
        assert name not in published(Location(image) / "labels")
        with pytest.raises(StoreError, match="unfinished run"):
            open_labels(f"{image}/labels/{name}")
        ran, stages = [], Stages()
        done = stitch(image, labels="cells", name=name, min_voxels=3, run=noting(ran), watch=stages)
        assert ("join" in stages.names) == (kind is ComponentBlocks)
        assert done.n_run == 24 - (n if kind is InstanceBlocks else 0)
        n_components = sum(isinstance(work, ComponentBlocks) for work in ran)
        assert n_components == (24 - n if kind is ComponentBlocks else 0)
        assert digest_but_name(image, name) == expected


class Stages:
    """A watcher that notes the stages; see Watcher."""

    def __init__(self):
        self.names = []

    def begin(self, stage, *, n_blocks, n_done):
        del n_blocks, n_done
        self.names.append(stage)

    def advance(self, record):
        del record


def noting(ran):
    """Return a runner that notes the work of each block that it runs."""

    def run(work, indices, *, on_record):
        indices = list(indices)
        ran.extend([work] * len(indices))
        return run_serial(work, indices, on_record=on_record)

    return run


def digest_but_name(image, name):
    """Return what tree_digest does of a label volume; its metadata, which hold its name, are compared without it."""
    folder = Path(image) / "labels" / name
    metadata = json.loads((folder / "zarr.json").read_text())
    for each in metadata["attributes"]["ome"]["multiscales"]:
        assert each.pop("name") == name
    return tree_digest(folder) | {"zarr.json": metadata}


def test_what_is_lost_on_the_way_or_afterwards_is_made_again_and_ends_in_the_same_bytes(tmp_path):
    image = class_labels(tmp_path, mixed((13, 22, 31)), block=8)
    stitch(image, labels="cells", name="nuclei")
    folder = Location(image) / "labels" / "nuclei"
    expected = tree_digest(folder.url)
    for lost in (("0/c/1/0/2",), ("0/c/0/0/0", "0/c/1/2/3")):
        for key in lost:
            (folder / key).delete()
        assert stitch(image, labels="cells", name="nuclei").n_run == len(lost)
        assert tree_digest(folder.url) == expected
    with pytest.raises(KeyboardInterrupt):
        stitch(image, labels="cells", name="second", run=Stopping(InstanceBlocks, 5))
    records = Location(image) / "labels" / "second" / ".stitching"
    assert len(list((records / "tables").files())) == 24
    for key in ("joined.json", "records/3.npz", "records/20.npz", "tables/7.npz"):
        (records / key).delete()
    assert stitch(image, labels="cells", name="second").n_run == 19
    assert digest_but_name(image, "second") == digest_but_name(image, "nuclei")


def test_the_same_command_again_finds_all_done_without_reading_a_voxel(tmp_path):
    image = class_labels(tmp_path, mixed((20, 30)), block=16)
    first = stitch(image, labels="cells", name="nuclei")
    before, ran = tree_digest(image), []
    again = stitch(image, labels="cells", name="nuclei", run=noting(ran))
    assert (again.n_run, again.n_instances, ran) == (0, first.n_instances, [])
    assert tree_digest(image) == before


def test_dask_workers_write_the_same_bytes(tmp_path):
    image = class_labels(tmp_path, mixed((13, 22, 31)), block=8)
    stitch(image, labels="cells", name="serial", min_voxels=2)
    with open_runner(n_workers=2) as run:
        stitch(image, labels="cells", name="shared", min_voxels=2, run=run)
    assert digest_but_name(image, "shared") == digest_but_name(image, "serial")


def test_images_in_a_bucket_are_stitched_as_those_on_a_disk_are(tmp_path, bucket):
    voxels = mixed((20, 30))
    image = class_labels(tmp_path, voxels, block=16, image=f"{bucket}/scan.zarr")
    with pytest.raises(KeyboardInterrupt):
        stitch(image, labels="cells", name="nuclei", min_voxels=2, run=Stopping(InstanceBlocks, 1))
    done, expected = stitch(image, labels="cells", name="nuclei", min_voxels=2), whole(voxels, (1, 2), min_voxels=2)
    assert (done.n_run, done.n_instances) == (3, expected.max())
    made = open_labels(f"{image}/labels/nuclei")
    np.testing.assert_array_equal(made.array[:], expected)
    assert sorted({key.partition("/")[0] for key in made.location.files()}) == ["0", "zarr.json"]


def test_a_killed_process_group_goes_on_where_it_was(tmp_path):
    voxels = mixed((48, 64, 64))
    image = class_labels(tmp_path, voxels, block=8, classes=("background", "a", "b"))
    command = [sys.executable, "-m", "pipeline.cli", "stitch", image, "--labels", "cells", "--json", "--name"]
    stitch(image, labels="cells", name="undisturbed")
    folder = Location(image) / "labels" / "killed"
    for below in (".stitching/records", "0/c"):
        victim = subprocess.Popen([*command, "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                  start_new_session=True)  # fmt: skip
        deadline = time.monotonic() + 60
        while n_whole(folder / below) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        assert 0 < n_whole(folder / below) < 384
    n_before = n_whole(folder / "0" / "c")
    again = subprocess.run([*command, "killed"], check=True, capture_output=True, text=True)
    told = json.loads(again.stdout)
    assert (told["blocks_kept"], told["instances"]) == (n_before, whole(voxels, (1, 2)).max())
    assert digest_but_name(image, "killed") == digest_but_name(image, "undisturbed")


def test_settings_of_another_run_are_refused(tmp_path):
    image = class_labels(tmp_path, mixed((20, 30)), block=16)
    add_labels(open_image(Location(image)), mixed((20, 30), seed=1), name="others", seed=2)
    stitch(image, labels="cells", name="nuclei")
    before = tree_digest(image)
    for given, differing in (
        ({"min_voxels": 2}, "min_voxels"), ({"classes": ("2",)}, "classes"), ({"labels": "others"}, "labels"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match=f"labels nuclei must come from one run, got another {differing} "):
            stitch(image, name="nuclei", **({"labels": "cells"} | given))
    assert tree_digest(image) == before


BAD = {
    "no such labels": ({"labels": "nothing"}, StoreError, "labels must exist, got none at"),
    "no such class": ({"classes": ("wall",)}, ArgumentError, "classes of .* are background, nucleus, got wall; name"),
    "no such value": ({"classes": ("2",)}, ArgumentError, "classes of .* are background, nucleus, got 2; name"),
    "a class twice": ({"classes": ("1", "nucleus")}, ArgumentError, "classes must be named once, got 1,nucleus"),
    "the name of the classes": ({"name": "cells"}, StoreError, "labels cells must come from one run"),
    "a bad name": ({"name": "a/b"}, ArgumentError, "a label name has letters"),
    "no voxels": ({"min_voxels": 0}, ArgumentError, "min_voxels must be at least 1, got 0; use 1"),
    "instances of a run": ({"labels": "made"}, StoreError, "got instances at .*; name others"),
    "instances of a scan": ({"labels": "scanned"}, StoreError, "labels must have at most 256 values to be classes"),
}


def test_bad_input_is_refused_in_one_line_and_nothing_is_written(tmp_path):
    image = class_labels(tmp_path, mixed((20, 30), n_classes=2), block=16, classes=("background", "nucleus"))
    stitch(image, labels="cells", name="made")
    add_labels(open_image(Location(image)), np.arange(600, dtype=np.uint32).reshape(20, 30), name="scanned")
    before = tree_digest(image)
    for given, error, message in BAD.values():
        with pytest.raises(error, match=message) as refused:
            stitch(image, **({"labels": "cells", "name": "nuclei"} | given))
        assert "\n" not in str(refused.value)
    assert tree_digest(image) == before


def test_blocks_that_fail_are_quarantined_and_a_rerun_goes_on(tmp_path):
    image = class_labels(tmp_path, mixed((40, 30)), block=16, classes=("background", "a", "b"))
    shard = Path(image) / "labels" / "cells" / "0" / "c" / "1" / "1"
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-8] + bytes(8))
    with pytest.raises(QuarantineError, match=r"got 1 that failed again and again .*\(blocks 3\)"):
        stitch(image, labels="cells", name="nuclei")
    assert published(Location(image) / "labels") == ["cells"]
    shard.write_bytes(kept)
    ran = []
    stitch(image, labels="cells", name="nuclei", run=noting(ran))
    assert sum(isinstance(work, ComponentBlocks) for work in ran) == 1


def test_class_labels_that_change_meanwhile_end_the_run(tmp_path):
    image = class_labels(tmp_path, mixed((40, 30)), block=16, classes=("background", "a", "b"))
    with pytest.raises(KeyboardInterrupt):
        stitch(image, labels="cells", name="nuclei", run=Stopping(InstanceBlocks, 0))
    shards = Path(image) / "labels" / "cells" / "0" / "c"
    (shards / "0" / "0").write_bytes((shards / "1" / "0").read_bytes())
    with pytest.raises(RunError, match=r"labels must stay the same while they are stitched, got \d+ components in"):
        stitch(image, labels="cells", name="nuclei")


def test_the_command_prints_what_was_made(tmp_path, capsys):
    voxels = mixed((20, 30))
    image = class_labels(tmp_path, voxels, block=16, classes=("background", "a", "b"))
    command = ["stitch", image, "--labels", "cells", "--name", "nuclei", "--classes", "b", "--min-voxels", "3"]
    assert main([*command, "--json"]) == 0
    told, expected = json.loads(capsys.readouterr().out), whole(voxels, (2,), min_voxels=3)
    assert (told["instances"], told["blocks_run"], told["voxels"]) == (expected.max(), 4, voxels.size)
    assert (told["labels"], told["classes"], told["min_voxels"]) == (f"{image}/labels/nuclei", ["b"], 3)
    assert main(["info", told["labels"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["instances"] == expected.max()
    assert main([*command, "--classes", "c"]) == 2
    assert capsys.readouterr().err.strip() == (
        f"haloseg: classes of {image}/labels/cells are background, a, b, got c; name some of them"
    )


def test_segment_makes_instances_of_its_labels_where_it_is_asked_to(tmp_path, capsys):
    scan_file(tmp_path / "scan.tif", (40, 50))
    settings = UNetSettings(dims=2, width=2, depth=1, padding=Padding.SAME, n_convs=1, n_classes=3)
    model, image = model_file(tmp_path / "model.safetensors", settings), str(tmp_path / "scan.zarr")
    command = ["segment", str(tmp_path / "scan.tif"), "--model", model, "--name", "cells", "--instances"]
    assert main([*command, "nuclei", "--json"]) == 0
    told, classes = json.loads(capsys.readouterr().out), open_labels(f"{image}/labels/cells").array[:]
    expected = whole(classes, (1, 2))
    assert (told["instances"], told["instance_labels"]) == (expected.max(), f"{image}/labels/nuclei")
    np.testing.assert_array_equal(open_labels(told["instance_labels"]).array[:], expected)
    before = tree_digest(image)
    assert main([*command, "nuclei", "--json"]) == 0
    assert main([*command, "cells"]) == 2
    assert "instances need a name of their own, got cells for both" in capsys.readouterr().err
    elsewhere = ["segment", image, "--model", model, "--name", "others", "--instances", "nuclei"]
    assert main(elsewhere) == 2
    assert "got nuclei, which names another; choose another" in capsys.readouterr().err
    values = UNetSettings(dims=2, width=2, depth=1, padding=Padding.SAME, n_convs=1, n_classes=1, head=Head.LINEAR)
    model_file(model, values, target_windows=((0.0, 1.0),))
    assert main([*command[:3], model, "--name", "restored", "--instances", "nuclei"]) == 2
    assert "instances are made of classes, got a network without" in capsys.readouterr().err
    assert tree_digest(image) == before


MEASURED = """
import json
import sys

from peaks import grown

from pipeline.stitch import stitch


def measure(image):
    return grown(lambda: stitch(image, labels="cells", name="nuclei"))
"""


def test_memory_does_not_grow_with_the_volume(tmp_path):
    images = []
    for name, shape in {"few": (64, 128, 512), "many": (64, 512, 512)}.items():
        (tmp_path / name).mkdir()
        lumps = np.kron(mixed(tuple(n // 8 for n in shape)), np.ones((8, 8, 8), np.uint8))
        images.append(class_labels(tmp_path / name, lumps, block=64, classes=("background", "a", "b")))
    (few,), (many,) = (each_measured(MEASURED, [[image]]) for image in images)
    assert many - few < 64 * 512 * 512 * 8 / 3, (few >> 20, many >> 20)  # a third of the larger volume's ids
