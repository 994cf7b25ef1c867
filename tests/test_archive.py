from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from bodies import VOXELS, enhanced, series, write_dicom
from hypothesis import given, settings
from hypothesis import strategies as st
from volumes import as_of_before, model_file, scan_file

from pipeline.archive import Archive, State, survey
from pipeline.compute.runner import run_serial
from pipeline.config import Precision
from pipeline.errors import ArgumentError, ModelError
from pipeline.ingest import ingest, ingest_labels
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.store.image import open_image
from pipeline.store.lease import lease
from pipeline.store.location import Location
from pipeline.store.results import mark_reported
from pipeline.store.roots import check_paths
from pipeline.store.statistics import Normalisation
from pipeline.unet.settings import UNetSettings

SHAPE = (8, 16, 16)


def aged(path: Path, *, seconds: float) -> Path:
    when = time.time() - seconds
    os.utime(path, (when, when))
    return path


@pytest.fixture
def home(tmp_path):
    for age, name in ((300, "b.tif"), (400, "a.tif"), (500, "sub/c.tif"), (600, "a-truth.tif")):
        (tmp_path / "scans" / name).parent.mkdir(parents=True, exist_ok=True)
        scan_file(tmp_path / "scans" / name, SHAPE)
        aged(tmp_path / "scans" / name, seconds=age)
    (tmp_path / "scans" / "notes.txt").write_text("no scan")
    model_file(tmp_path / "model.safetensors")
    return tmp_path


def archive_of(home: Path, **settings) -> Archive:
    return Archive(str(home / "scans"), str(home / "model.safetensors"), **settings)


def states(archive: Archive) -> dict[str, State]:
    return {scan.relative: scan.state for scan in survey(archive).scans}


def segmented(scan: str, image: str, archive: Archive) -> None:
    ingest(scan, image)
    segment(plan_segment(image, model=archive.model, name=archive.name), run=run_serial)


def test_scans_are_found_in_folders_and_the_oldest_comes_first(home):
    found = survey(archive_of(home))
    assert [scan.relative for scan in found.scans] == ["a-truth.tif", "sub/c.tif", "a.tif", "b.tif"]
    assert {scan.state for scan in found.scans} == {State.NEW}
    assert found.others == ("notes.txt",)
    assert found.todo == found.scans


def test_what_a_model_makes_of_slices_by_their_own_statistics_is_known_again(home):
    archive, slices = archive_of(home), UNetSettings(dims=2, width=2, depth=1)
    model_file(home / "model.safetensors", slices, normalisation=Normalisation.ZSCORE_SLICEWISE)
    segmented(survey(archive).scans[0].path, survey(archive).scans[0].image, archive)
    assert states(archive)["a-truth.tif"] is State.DONE
    as_of_before(Path(survey(archive).scans[0].image))
    assert states(archive)["a-truth.tif"] is State.BLOCKED


def test_a_truth_is_no_scan_and_is_known_by_its_scan(home):
    found = {scan.relative: scan for scan in survey(archive_of(home, truth="{stem}-truth.tif")).scans}
    assert sorted(found) == ["a.tif", "b.tif", "sub/c.tif"]
    assert found["a.tif"].truth == str(home / "scans" / "a-truth.tif")
    assert found["b.tif"].truth is None
    with pytest.raises(ArgumentError, match=r"truth must be a path with \{stem\} or \{name\}, got \{x\}"):
        survey(archive_of(home, truth="{x}"))


def test_a_truth_is_named_by_what_the_image_is_named_by(home):
    for name in ("z.nii.gz", "z-truth.nii.gz", "y.NII.GZ", "y-truth.nii.gz"):
        (home / "scans" / name).write_bytes(b"")
    archive = archive_of(home, pattern="y*,z*", truth="{stem}-truth.nii.gz")
    found = {scan.relative: (scan.image, scan.truth) for scan in survey(archive).scans}
    assert found == {
        name: (f"{home}/scans/{name[0]}.zarr", f"{home}/scans/{name[0]}-truth.nii.gz")
        for name in ("z.nii.gz", "y.NII.GZ")
    }
    with pytest.raises(ArgumentError, match="truth must not be the scan itself"):
        survey(replace(archive, truth="{stem}.nii.gz"))


def dicom_file(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM")
    aged(path, seconds=100)


def test_dicom_files_that_lie_together_are_one_scan_and_one_alone_is_one(home):
    for name in ("series/1", "series/2", "series/3.dcm", "sub/one.dcm", "loose-1", "loose-2"):
        dicom_file(home / "scans" / name)
    found = survey(archive_of(home))
    scans = {scan.relative: scan for scan in found.scans}
    assert sorted(scans) == ["a-truth.tif", "a.tif", "b.tif", "series", "sub/c.tif", "sub/one.dcm"]
    assert (scans["series"].state, scans["series"].image) == (State.NEW, f"{home}/scans/series.zarr")
    hint = "(a DICOM slice; move those of a series into a folder)"
    assert sorted(found.others) == [f"loose-1 {hint}", f"loose-2 {hint}", "notes.txt"]
    for pattern, names in (
        ("**/", ["series", "sub"]), ("**/,**/*.dcm", ["series", "sub"]), ("*/*.dcm", ["series/3.dcm", "sub/one.dcm"]),
        ("*.tif", ["a-truth.tif", "a.tif", "b.tif"]),
    ):  # fmt: skip
        assert sorted(states(archive_of(home, pattern=pattern))) == names
    assert states(archive_of(home, pattern="series/*"))["series"] is State.NEW
    dicom_file(home / "scans" / "series" / "4")
    os.utime(home / "scans" / "series" / "4")
    assert states(archive_of(home, pattern="series/*")) == {"series": State.GROWING}


def test_dicom_files_of_many_frames_are_scans_each(home):
    scans = home / "scans"
    for name in ("many/a.dcm", "many/b", "mixed/a", "root.dcm"):
        aged(enhanced(scans / name), seconds=100)
    (slice_,) = set(write_dicom(scans / "mixed", VOXELS[:1], np.eye(3)).iterdir()) - {scans / "mixed" / "a"}
    series(scans / "stack")
    for number in range(2):
        enhanced(scans / "parts" / f"{number}", first=7 * number, ConcatenationUID="1.2.3")
    for file in scans.glob("*/*"):
        aged(file, seconds=100)
    found = survey(archive_of(home, pattern="**/*"))
    ours = {scan.relative for scan in found.scans if not scan.relative.endswith(".tif")}
    assert ours == {"many/a.dcm", "many/b", "mixed/a", f"mixed/{slice_.name}", "root.dcm", "stack", "parts"}
    assert found.others == ("notes.txt",)
    both = survey(archive_of(home, pattern="**/,**/*")).scans
    assert ours == {scan.relative for scan in both if not scan.relative.endswith(".tif")} - {"sub"}


def test_priority_and_patterns_choose(home):
    first = survey(archive_of(home, priority=("b*", "sub/*"))).scans
    assert [scan.relative for scan in first] == ["b.tif", "sub/c.tif", "a-truth.tif", "a.tif"]
    assert list(states(archive_of(home, pattern="*.tif"))) == ["a-truth.tif", "a.tif", "b.tif"]
    assert list(states(archive_of(home, pattern="sub/*, b.*"))) == ["sub/c.tif", "b.tif"]


def test_labels_whose_run_was_killed_before_its_report_are_done_but_for_that(home):
    archive = archive_of(home, pattern="a.tif", name="cells")
    (scan,) = survey(archive).scans
    ingest(scan.path, scan.image)
    plan = plan_segment(scan.image, model=archive.model, name="cells")
    segment(replace(plan, result=replace(plan.result, report_due=True)), run=run_serial)
    about = Path(scan.image) / "labels" / "cells" / "zarr.json"
    before = json.loads(about.read_bytes())
    (scan,) = survey(archive).scans
    assert (scan.state, scan.is_todo, scan.n_voxels) == (State.UNREPORTED, True, 8 * 16 * 16)
    with lease(Location(scan.image)):
        assert states(archive) == {"a.tif": State.TAKEN}
    image = open_image(Location(scan.image))
    for _ in range(2):
        mark_reported(image, "cells")
        assert states(archive) == {"a.tif": State.DONE}
    assert before["attributes"]["haloseg"].pop("report") == "due"
    assert json.loads(about.read_bytes()) == before


def test_a_scan_is_done_when_labels_of_it_by_this_model_are_published(home):
    archive = archive_of(home, pattern="a.tif", name="cells")
    (scan,) = survey(archive).scans
    ingest(scan.path, scan.image)
    assert states(archive) == {"a.tif": State.UNFINISHED}
    segmented(scan.path, scan.image, archive)
    assert states(archive) == {"a.tif": State.DONE}
    (scan,) = survey(archive).scans
    assert scan.n_voxels == 8 * 16 * 16
    assert states(archive_of(home, pattern="a.tif", name="other")) == {"a.tif": State.UNFINISHED}
    tifffile.imwrite(scan.path, tifffile.imread(scan.path) + 1)  # another scan under the same name
    aged(Path(scan.path), seconds=200)
    (changed,) = survey(archive).scans
    assert changed.state is State.BLOCKED
    assert changed.detail == f"the scan was changed after its image was made; delete {scan.image} to do it again"


def test_labels_of_another_model_are_left_and_told(home):
    archive = archive_of(home, pattern="a.tif")
    (scan,) = survey(archive).scans
    segmented(scan.path, scan.image, archive)
    (scan,) = survey(replace(archive, precision=Precision.BF16)).scans
    assert scan.state is State.BLOCKED
    assert scan.detail.startswith("labels classes are of another precision; choose another name or delete ")
    model_file(home / "model.safetensors", seed=1)
    (scan,) = survey(archive).scans
    assert scan.state is State.BLOCKED
    assert scan.detail.startswith("labels classes are of another model; choose another name or delete ")


def test_labels_that_were_ingested_under_the_name_are_left_and_told(home):
    archive = archive_of(home, pattern="a.tif", name="truth")
    (scan,) = survey(archive).scans
    ingest(scan.path, scan.image)
    ingest_labels(scan.path, image=scan.image, name="truth")
    (scan,) = survey(archive).scans
    assert scan.state is State.BLOCKED
    assert scan.detail.startswith("labels truth are of another model; choose another name or delete ")


def test_what_lies_beside_scans_is_not_taken_for_one(home):
    archive = archive_of(home)
    for scan in survey(archive).scans:
        segmented(scan.path, scan.image, archive)
    (home / "scans" / "left.tif.partial").write_text("")
    with lease(Location(str(home / "scans" / "x.zarr"))):
        found = survey(archive)
    assert set(states(archive).values()) == {State.DONE}
    assert len(found.scans) == 4


def test_a_relative_tree_of_images_in_the_archive_holds_no_scans(home, monkeypatch):
    monkeypatch.chdir(home / "scans")
    archive = archive_of(home, pattern="**/*", images="made/")
    (first, *_) = [scan for scan in survey(archive).scans if scan.relative == "a.tif"]
    assert first.image == str(home / "scans" / "made" / "a.zarr")
    (home / "scans" / "a.tif").rename(home / "a.tif")
    ingest(str(home / "a.tif"), first.image)
    assert "made/a.zarr" not in states(archive)


def test_images_may_go_to_a_tree_of_their_own_and_may_be_scans_themselves(home):
    archive = archive_of(home, images=str(home / "images"))
    assert {scan.relative: scan.image for scan in survey(archive).scans}["sub/c.tif"] == str(home / "images/sub/c.zarr")
    ingest(str(home / "scans/b.tif"), str(home / "scans/elsewhere/copy.zarr"))
    found = {scan.relative: scan for scan in survey(archive).scans}
    assert found["elsewhere/copy.zarr"].image == found["elsewhere/copy.zarr"].path


def test_a_scan_that_was_changed_just_now_waits_and_one_from_the_future_does_not(home):
    aged(home / "scans" / "a.tif", seconds=5)
    aged(home / "scans" / "b.tif", seconds=-3600)
    now = states(archive_of(home, pattern="*.tif"))
    assert (now["a.tif"], now["b.tif"]) == (State.GROWING, State.GROWING)  # its clock is ahead: it came just now
    assert states(archive_of(home, pattern="a.tif", settle_s=1)) == {"a.tif": State.NEW}
    assert states(archive_of(home, pattern="b.tif", settle_s=0)) == {"b.tif": State.NEW}


def test_a_zarr_that_is_being_copied_waits_however_deep_the_copier_is(home):
    store = home / "scans" / "big.zarr"
    zarr.create_array(store, shape=(8, 16, 16), chunks=(4, 16, 16), dtype="u1")[:] = 1
    for each in (*store.rglob("*"), store):
        aged(each, seconds=500)
    archive = archive_of(home, pattern="*.zarr")
    assert states(archive) == {"big.zarr": State.NEW}
    aged(store / "c" / "1" / "0" / "0", seconds=3)
    assert states(archive) == {"big.zarr": State.GROWING}


def test_names_with_brackets_and_scans_of_one_stem_have_images_of_their_own(home):
    for name in ("x[1].tif", "y[1].tif", "twin.tif", "twin.tiff"):
        scan_file(home / "scans" / name, SHAPE)
        aged(home / "scans" / name, seconds=100)
    archive = archive_of(home, pattern="x*,y*,twin*")
    images = {scan.relative: scan.image.removeprefix(f"{home}/scans/") for scan in survey(archive).scans}
    assert images == {
        "x[1].tif": "x[1].zarr", "y[1].tif": "y[1].zarr", "twin.tif": "twin.tif.zarr", "twin.tiff": "twin.tiff.zarr",
    }  # fmt: skip
    ingest(str(home / "scans" / "twin.tif"), str(home / "scans" / "twin.zarr"))
    images = {scan.relative: scan.image.removeprefix(f"{home}/scans/") for scan in survey(archive).scans}
    assert (images["twin.tif"], images["twin.tiff"]) == ("twin.zarr", "twin.tiff.zarr")


def test_what_is_damaged_blocks_itself_alone(home):
    (home / "scans" / "a.zarr").mkdir()
    (home / "scans" / "a.zarr" / "zarr.json").write_text('{"zarr_fo')
    (home / "scans" / "odd\nname.tif").write_bytes(b"II*\0")
    found = {scan.relative: scan for scan in survey(archive_of(home, pattern="*.tif,*.zarr")).scans}
    assert found["a.tif"].state is State.BLOCKED
    assert "metadata must be JSON, got a damaged" in found["a.tif"].detail
    assert found["b.tif"].state is State.NEW
    assert survey(archive_of(home, pattern="*.tif")).others == ("'odd\\nname.tif'",)


def test_truths_may_lie_in_a_folder_beside(home):
    (home / "scans" / "raw").mkdir()
    (home / "scans" / "truth").mkdir()
    for folder in ("raw", "truth"):
        scan_file(home / "scans" / folder / "z.tif", SHAPE)
    (scan,) = survey(archive_of(home, pattern="*/z.tif", truth="../truth/{name}")).scans
    assert (scan.relative, scan.truth) == ("raw/z.tif", str(home / "scans" / "truth" / "z.tif"))
    for bad in ("{name}", "{stem.x}", "{stem[a]}"):
        with pytest.raises(ArgumentError, match="truth must "):
            survey(archive_of(home, truth=bad))
    with pytest.raises(ArgumentError, match=r"a pattern must be a glob such as \*\*/\*\.tif, got '\*\*\.tif'"):
        survey(archive_of(home, pattern="**.tif"))


def test_a_scan_that_another_run_is_at_is_left_to_it(home):
    archive = archive_of(home, pattern="a.tif")
    with lease(Location(str(home / "scans" / "a.zarr"))):
        (scan,) = survey(archive).scans
        assert scan.state is State.TAKEN
        assert "process" in scan.detail
        assert survey(archive).todo == ()
    assert states(archive) == {"a.tif": State.NEW}


def test_folders_of_slices_are_scans_where_a_pattern_says_so_and_links_do_not_lead_in_circles(home):
    folder = home / "scans" / "stack"
    folder.mkdir()
    for z in range(3):
        scan_file(folder / f"{z}.tif", (20, 20))
        aged(folder / f"{z}.tif", seconds=100)
    (folder / "round").symlink_to(home / "scans")
    assert states(archive_of(home, pattern="stack/")) == {"stack": State.NEW}
    assert "stack/round/a.tif" not in states(archive_of(home))


def test_an_archive_and_its_model_must_be_there(home):
    with pytest.raises(ArgumentError, match=r"an archive must be a folder or prefix that exists, got .*nowhere"):
        survey(Archive(str(home / "nowhere"), str(home / "model.safetensors")))
    with pytest.raises(ArgumentError, match=r"an archive must be a folder or prefix that exists, got .*model"):
        survey(Archive(str(home / "model.safetensors"), str(home / "model.safetensors")))
    with pytest.raises(ModelError, match="a model must be a readable file"):
        survey(Archive(str(home / "scans"), str(home / "none.safetensors")))


def test_paths_lie_in_the_roots_whatever_links_and_dots_say(tmp_path, monkeypatch):
    monkeypatch.setenv("HALOSEG_ROOTS", f"{tmp_path}/in, s3://bucket/archive")
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    check_paths(f"{tmp_path}/in/scan.tif", f"{tmp_path}/in/x.h5::data", "s3://bucket/archive/a.zarr", None)
    bad = (
        f"file:{tmp_path}/in/x.tif", "~/x.tif", f"simplecache::file://{tmp_path}/in/x", f"{tmp_path}/in/link/scan.tif",
        f"{tmp_path}/in/../out/x.tif", f"{tmp_path}/inner", "s3://bucket/archive2",
        "s3://bucket/archive/../x", "/etc/passwd", "relative.tif",
    )  # fmt: skip
    for path in bad:
        with pytest.raises(ArgumentError, match=r"a path must (lie in HALOSEG_ROOTS|be plain)"):
            check_paths(path)


@settings(max_examples=25)
@given(st.from_regex(r"[a-z]{1,8}:[a-z]{1,8}", fullmatch=True))
def test_a_path_with_credentials_is_refused_and_not_repeated(secret):
    with pytest.raises(ArgumentError, match="a path must hold no credentials") as caught:
        check_paths(f"s3://{secret}@bucket/scan.zarr")
    assert secret not in str(caught.value)
    with pytest.raises(ArgumentError, match="a path must hold no credentials"):
        check_paths(f"https://host/scan.zarr?X-Amz-Signature={secret}")
