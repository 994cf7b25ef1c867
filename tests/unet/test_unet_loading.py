"""Patches that a process apart reads: the very same, and nothing is left of it, however it or the training ends."""

import gc
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass, replace
from multiprocessing import active_children
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
import torch
from odd_arrays import Odd
from test_unet_fit import RECIPE, fitted, patches_of

from pipeline.errors import ArgumentError, BudgetError, RunError
from pipeline.geometry.box import Box
from pipeline.unet.training.augment import Augmentation
from pipeline.unet.training.batches import draw_batch
from pipeline.unet.training.checkpoint import CheckpointFile
from pipeline.unet.training.fit import fit
from pipeline.unet.training.loading import Loading, loaded, loading_for
from pipeline.unet.training.overlapping import Overlapping
from pipeline.unet.training.patches import Source
from pipeline.unet.training.reader import Task
from pipeline.unet.training.targets import Target
from pipeline.unet.training.warp import batch_of, unpacked

pytestmark = pytest.mark.usefixtures("one_thread")
WARPED = Augmentation(
    warped_share=0.7, rotation_degrees=180, scale=0.3, elastic_sigma_voxels=1, gamma=0.3, noise=0.1, blur_voxels=1
)
ROOT = Path(__file__).parents[2]
SETTINGS = RECIPE.network(dims=2, in_channels=1, n_classes=2)


def with_source(patches, **more):
    return replace(patches, sources=tuple(replace(source, **more) for source in patches.sources))


def cases():
    flat, _ = patches_of((128, 144), SETTINGS)
    recipe = replace(RECIPE, depth=1, patch=16, batch=2)
    deep, _ = patches_of((32, 40, 72), recipe.network(dims=3, in_channels=1, n_classes=2), recipe)
    flat, deep = (replace(each, augmentation=WARPED) for each in (flat, deep))
    (source,) = flat.sources
    sparse = np.where(np.random.default_rng(0).random(source.labels.shape) < 0.05, source.labels, 255).astype(np.uint8)
    codes = Overlapping((source.labels.astype(np.int8), np.roll(source.labels, 5, 1).astype(np.int8) - 1))
    target = Target(source.image[..., ::-1].copy(), ((90.0, 0.1),), (255.0,))
    other = Source(source.image[:, ::2], source.labels[::2], ((90.0, 0.1, -1.0, 1.0),), Box((0, 3), (60, 140)))
    return {
        "2-D": flat, "3-D": deep, "as it is": replace(flat, augmentation=Augmentation(flips=False)),
        "ignore": replace(with_source(flat, labels=sparse), ignore=255).with_labelled(),
        "overlapping": replace(with_source(flat, labels=codes), class_values=(), n_overlapping=2),
        "target": with_source(flat, target=target),
        "resampled": with_source(flat, steps=(0.7, 1.6)),
        "foreground": deep.with_foreground(0.5),
        "borders": with_source(flat, borders=np.linspace(0, 5, sparse.size, dtype=np.float32).reshape(sparse.shape)),
        "two images": replace(flat, sources=(source, other)),
    }  # fmt: skip


CASES = cases()


def task_of(patches, *, n=3, first=1, last=6, share=slice(None)):
    return Task(patches, n, 5, first, last, share)


def arrays_in(value):
    """Yield all arrays and numbers of dataclasses in their order."""
    if is_dataclass(value):
        for field in fields(value):
            yield from arrays_in(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from arrays_in(each)
    else:
        yield np.asarray(value)


def read(task, loading):
    """Return all that is read, copied from where it lies, and the batches that it makes."""
    with loaded(task, loading=loading) as steps:
        return [
            (step, [each.copy() for each in arrays_in(packed)], unpacked(packed, device="cpu").images.clone())
            for step, packed in steps
        ]


@pytest.fixture
def nothing_left():
    """See that no process, descriptor or shared memory is left."""
    before = left()
    yield
    assert left() == before
    assert active_children() == []


def left():
    gc.collect()  # a traceback holds patches
    processes = [each.pid for each in psutil.Process().children(recursive=True)]
    n_mapped = Path("/proc/self/maps").read_text().count("memfd:haloseg")
    return processes, len(list(Path("/proc/self/fd").iterdir())), n_mapped


@pytest.mark.parametrize("name", CASES)
def test_a_process_reads_what_threads_read_bit_by_bit(name, nothing_left):
    task = task_of(CASES[name])
    here, there = (read(task, loading) for loading in (Loading.THREADS, Loading.PROCESS))
    assert [step for step, _, _ in there] == [1, 2, 3, 4, 5, 6]
    for (_, arrays, images), (_, others, same) in zip(here, there, strict=True):
        assert len(arrays) > 10
        for one, other in zip(arrays, others, strict=True):
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)
        assert torch.equal(images, same)


def test_a_process_reads_its_share_and_from_a_step_on():
    patches = CASES["2-D"]
    for step, _, images in read(task_of(patches, n=5, first=4, share=slice(1, 3)), Loading.PROCESS):
        expected = batch_of(draw_batch(patches, 5, seed=5, step=step)[1:3], device="cpu")
        assert torch.equal(images, expected.images)
    assert step == 6
    assert read(task_of(patches, first=3, last=2), Loading.PROCESS) == []


def test_patches_that_outgrow_their_memory_are_whole(nothing_left):
    small = replace(CASES["2-D"], core=(8, 8), halo=(0, 0))
    grown = replace(CASES["2-D"], augmentation=replace(WARPED, scale=30.0, warped_share=0.3))
    for patches in (small, grown):
        here, there = (read(task_of(patches, last=12), loading) for loading in (Loading.THREADS, Loading.PROCESS))
        assert all(torch.equal(one[2], other[2]) for one, other in zip(here, there, strict=True))


@pytest.mark.parametrize("dims", [2, 3])
def test_weights_do_not_depend_on_who_reads_nor_on_restarts(dims, tmp_path, nothing_left):
    recipe = replace(
        RECIPE, steps=6, validate_every=3, augmentation=WARPED, dropout=0.3, ema=0.9, foreground_share=0.5,
        **({} if dims == 2 else {"depth": 1, "patch": 16, "batch": 2}),
    )  # fmt: skip
    settings = recipe.network(dims=dims, in_channels=1, n_classes=2)
    about = {"recipe": recipe, "shape": (128, 144) if dims == 2 else (32, 40, 72)}
    here, there = (fitted(settings, loading=loading, **about) for loading in Loading)
    file = CheckpointFile(str(tmp_path / "c"), {})

    def killed_at(step):
        if step.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(settings, loading=Loading.PROCESS, checkpoint=file, on_step=killed_at, **about)
    resumed = fitted(settings, loading=Loading.PROCESS, checkpoint=file, **about)
    assert resumed.n_before == 3
    for other in (there, resumed):
        assert other.curve == here.curve
        assert all(torch.equal(tensor, other.weights[name]) for name, tensor in here.weights.items())


@pytest.mark.parametrize(
    ("why", "error", "message"),
    [
        ("refused", ArgumentError, "^one line$"),
        ("damaged", RunError, r"patch must be readable, got ValueError: bad checksum in a chunk \(step 1\); mend the"),
        ("full", BudgetError, r"^the patches of a batch must fit .* step 1 \(MemoryError: Unable to .*a smaller batch"),
        ("failing", PermissionError, r"^\[Errno 13\] Permission denied: 'scan.zarr/c/0'$"),
        ("killed", RunError, "process that reads patches must live until the end, got its end by signal 9; see that"),
        ("left", RunError, "process that reads patches must live until the end, got its end by exit code 7; see that"),
    ],
)
def test_what_fails_there_is_told_here_in_one_line(why, error, message, nothing_left):
    patches = with_source(CASES["2-D"], image=Odd((1, 128, 144), why))
    _, check = patches_of((128, 144), SETTINGS)
    for loading in (Loading.PROCESS, Loading.THREADS)[: 1 if "process" in message else 2]:
        with pytest.raises(error, match=message) as caught:
            fit(SETTINGS, patches, validation=check, recipe=RECIPE, device="cpu", seed=0, loading=loading)
        assert "\n" not in str(caught.value)


def test_a_process_that_hangs_ends_with_the_training(nothing_left):
    patches = with_source(CASES["2-D"], image=Odd((1, 128, 144), "hanging"))
    others = set(psutil.Process().children())
    with loaded(task_of(patches), loading=Loading.PROCESS):
        (reader,) = set(psutil.Process().children()) - others
        while reader.num_threads() < 4:  # those that read, too
            time.sleep(0.01)


def test_patches_that_only_this_process_has_are_read_by_threads(caplog, monkeypatch, nothing_left):
    class Local(Odd):
        pass

    class InMain(Odd):
        pass

    InMain.__module__, InMain.__qualname__ = "__main__", "InMain"
    monkeypatch.setattr(sys.modules["__main__"], "InMain", InMain, raising=False)
    held = Odd((1, 128, 144), "refused", n_good=10**9)
    stored = replace(held, why=fsspec.filesystem("memory"))
    for image in (Local(held.shape, "refused", 10**9), InMain(held.shape, "refused", 10**9), stored):
        caplog.clear()
        patches = with_source(CASES["2-D"], image=image)
        assert [step for step, _, _ in read(task_of(patches, last=3), Loading.PROCESS)] == [1, 2, 3]
        (told,) = caplog.messages
        assert told.startswith("patches are read by threads, since a process apart cannot have them: ")


def test_the_process_that_reads_imports_no_torch():
    code = "import sys, pipeline.unet.training.reader, pipeline.store.reading; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed == "False\n"


def test_a_process_reads_for_a_gpu_and_threads_for_a_processor():
    assert loading_for("cuda") is Loading.PROCESS
    assert loading_for("cpu") is Loading.THREADS
