"""What each recipe that ships reaches on real scans with truth (HALOSEG_DATA): trained, segmented, compared.

Everything goes the way of the command line: ingest, train, segment, on whole held-back slices. Each case holds back for
the comparison what the training never sees, not even to choose its weights.

    python tests/benchmarks/bench_recipes.py CASE [--fold N] [--recipe NAME|TOML] [--steps N] [--minutes M] [--seed N]
        [--precision bf16] [--tta none flips rotations] [--trained FILE]

--tta compares the same network by each test-time augmentation in turn; --trained takes a model that is trained already.

V_rand, V_info and both kinds of pixel error are those of ``boundaries``.

The case "regression" removes noise that was added to fluorescence pictures of nuclei; beside it stand filters whose
strength was chosen by the truth of the very pictures they are compared on.
"""

import argparse
import csv
import json
import os
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import imagecodecs
import numpy as np
import tifffile
import zarr
from boundaries import boundary_scores, challenge_error
from scipy.ndimage import gaussian_filter
from skimage.restoration import denoise_nl_means

from pipeline.compute.runner import run_serial
from pipeline.config import Precision, Scheme, Tta
from pipeline.evaluate import evaluate
from pipeline.ingest import ingest, ingest_labels
from pipeline.labels.deviations import Deviations
from pipeline.labels.metrics import ContingencyTable
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.store.image import open_image
from pipeline.store.labels import open_labels
from pipeline.store.location import Location
from pipeline.train import train
from pipeline.unet.model import load_model
from pipeline.unet.training.borders import Separated
from pipeline.unet.training.course import Validation
from pipeline.unet.training.recipe import load_recipe

UNLABELLED = 2**31
NOISE = 20  # standard deviation of what is added, of 255 grey values
FOLDS = ((0, 5), (5, 10), (10, 15), (15, 20), (20, 24))


@dataclass
class Part:
    """A scan with its truth, and the voxel size that it is ingested with."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    voxel_size_um: tuple[float, ...] | None = None


def read(path):
    return tifffile.imread(path) if Path(path).suffix == ".tif" else imagecodecs.imread(str(path))


def membranes(data, fold):
    folder = data / "isbi2012"
    voxels, truth = read(folder / "train-volume.tif"), read(folder / "train-labels.tif")
    parts = [Part(f"slices{a}-{b}", voxels[a:b], truth[a:b], (0.05, 0.004, 0.004)) for a, b in FOLDS]
    return [part for number, part in enumerate(parts) if number != fold], [], [parts[fold]]


def nuclei(data, fold, kind, channels):
    folder, parts = data / "dsb2018", []
    for row in csv.DictReader((folder / "index.csv").open()):
        if row["kind"] != kind:
            continue
        picture = read(folder / "images" / f"{row['file']}.png")[..., :3]
        truth = read(folder / "labels" / f"{row['file']}.png")
        parts.append(Part(row["file"], picture[..., 0] if channels == 1 else picture, truth))
    test = parts[fold::5]
    rest = [part for part in parts if all(part is not each for each in test)]
    return rest[: -len(rest) // 8], rest[-len(rest) // 8 :], test


def phase(data, fold):
    sets = sorted((data / "usiigaci_phase").glob("train_set*"))
    parts = [Part(each.name, read(each / "raw.tif"), read(each / "instances_ids.png")) for each in sets]
    test = parts[fold]
    rest = [part for part in parts if part is not test]
    return rest[:-1], rest[-1:], [test]


def noisy(data, fold):
    learn, check, test = nuclei(data, fold, "gray_dark", 1)
    rng = np.random.default_rng(fold)

    def spoiled(part):
        noise = NOISE * rng.standard_normal(part.image.shape)
        return Part(f"noisy-{part.name}", (part.image + noise).astype(np.float32), part.image)

    return [[spoiled(part) for part in parts] for parts in (learn[:40], check[:6], test[:12])]


def bodies(data, fold):
    voxels = read(data / "fib25" / "grayscale.tif")
    with h5py.File(data / "fib25" / "bodies.h5") as file:
        truth = file["bodies"][:].astype(np.uint32)
    size = (0.01, 0.01, 0.01)
    return [Part("first", voxels[:135], truth[:135], size)], [], [Part("last", voxels[135:], truth[135:], size)]


def hardly_labelled(data, fold):
    """Return the same volume with a tenth of its slices labelled, compared with the whole truth as before."""
    (learn,), _, test = bodies(data, fold)
    truth = np.where(np.arange(len(learn.truth))[:, None, None] % 10, UNLABELLED, learn.truth)
    return [replace(learn, name="sparse", truth=truth.astype(np.uint32))], [], test


CASES = {
    "membrane2d": membranes,
    "nuclei2d": lambda data, fold: nuclei(data, fold, "gray_dark", 1),
    "slide-tissue": lambda data, fold: nuclei(data, fold, "colour_bright", 3),
    "cells-phase": phase,
    "boundary3d": bodies,
    "boundary3d-sparse": hardly_labelled,
    "regression": noisy,
}


def images_of(parts, folder):
    """Ingest the parts; returns the paths of the images."""
    paths = []
    for part in parts:
        image, scan = folder / f"{part.name}.zarr", folder / f"{part.name}.tif"
        if not image.exists():
            colour = part.image.ndim > part.truth.ndim
            tifffile.imwrite(scan, part.image, photometric="rgb" if colour else "minisblack")
            ingest(str(scan), str(image), voxel_size_um=part.voxel_size_um)
            tifffile.imwrite(scan, part.truth, photometric="minisblack")
            if part.image.dtype.kind == "f":
                ingest(str(scan), clean_of(image), voxel_size_um=part.voxel_size_um)
            else:
                ingest_labels(str(scan), image=str(image), name="truth")
            scan.unlink()
        paths.append(str(image))
    return paths


def clean_of(image):
    return str(image).removesuffix(".zarr") + "-clean.zarr"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--recipe")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--precision", type=Precision, choices=Precision, default=Precision.FLOAT32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tta", type=Tta, choices=Tta, nargs="+", default=[Tta.NONE])
    parser.add_argument("--trained", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("build/bench/recipes"))
    args = parser.parse_args()
    learn, check, test = CASES[args.case](Path(os.environ["HALOSEG_DATA"]), args.fold)
    recipe = load_recipe(args.recipe or args.case.removesuffix("-sparse"))
    recipe = replace(recipe, ignore=UNLABELLED) if args.case.endswith("-sparse") else recipe
    recipe = replace(recipe, steps=args.steps or recipe.steps, precision=args.precision)
    data = args.folder / args.case
    data.mkdir(parents=True, exist_ok=True)
    learn, check, tested = (images_of(parts, data) for parts in (learn, check, test))
    name = f"{Path(args.recipe or args.case).stem}-{args.fold}-{args.seed}"
    model, about = args.trained or data / f"{name}.safetensors", {}
    if not args.trained:
        about = trained(learn, check, recipe=recipe, model=model, args=args)
    of, compare = load_model(model), compared if recipe.loss.is_of_values else score
    for tta in args.tta:
        found = compare(
            args.case, tested, test, model=model, name=f"{name}-{tta}", values=of.class_values,
            scheme=Scheme(device=args.device, tta=tta),
        )  # fmt: skip
        row = {
            "case": args.case, "fold": args.fold, "seed": args.seed, "recipe": args.recipe or args.case,
            "precision": args.precision.value, **about, "tta": tta.value, **found,
        }  # fmt: skip
        with (args.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row, indent=1))


def trained(learn, check, *, recipe, model, args):
    """Train a network; returns what it took."""
    begin = cpu_s()

    def tell(now: Validation) -> None:
        print(f"step {now.step}: {now.train_loss:.4f}, held out {now.loss:.4f}, {now.told}", flush=True)

    model.unlink(missing_ok=True)  # what an earlier run of the benchmark made would be kept, and take no time
    values = recipe.loss.is_of_values
    truth = {"targets": [clean_of(each) for each in (*learn, *check)]} if values else {"labels": "truth"}
    result = train(
        learn, model=str(model), recipe=recipe, held_out=check, minutes=args.minutes, seed=args.seed,
        device=args.device, on_progress=tell, **truth,
    )  # fmt: skip
    return {
        "steps": result.n_steps, "best_step": result.best.step, "train_cpu_s": cpu_s() - begin,
        "train_s": result.wall_s,
    }  # fmt: skip


def score(case, images, parts, *, model, name, values, scheme):
    """Return Dice of each class over all held-back scans, and for membranes the scores of boundaries."""
    instances = case != "membrane2d"
    table, rand, info, error, challenge = ContingencyTable.empty(len(values)), [], [], [], []
    for path, part in zip(images, parts, strict=True):
        plan = plan_segment(path, model=str(model), name=name, probabilities=not instances, scheme=scheme)
        done = segment(plan, run=run_serial)
        got = np.asarray(open_labels(done.labels.location).array[:])
        truth = np.asarray(open_labels(Location(path) / "labels" / "truth").array[:])
        want = inside(truth, open_image(path)) if instances else np.searchsorted(values, truth)
        table += ContingencyTable.of(got, want.astype(np.uint8), values=tuple(range(len(values))))
        if not instances:
            likely = np.asarray(zarr.open_array(str(plan.probabilities.location / "0"), mode="r")[0])
            scores = boundary_scores(likely, part.truth > 0)
            rand.append(scores[0]), info.append(scores[1])
            error.append(float(((likely < 0.5) != (part.truth > 0)).mean()))
            challenge.append(challenge_error(likely, part.truth > 0))
    figures = table.figures()
    found = {"v_rand": rand, "v_info": info, "pixel_error": error, "challenge_pixel_error": challenge}
    more = {key: float(np.mean(each)) for key, each in found.items()} if rand else {}
    return {"dice": [each.dice for each in figures.classes], "accuracy": figures.accuracy, **more}


def compared(_case, images, parts, *, model, name, values, scheme):
    """Return PSNR in dB before, after, and after the best of two kinds of filters, mean of all held-back pictures."""
    assert not values
    found = {"before": [], "after": [], "gaussian": [], "nl_means": []}
    for path, part in zip(images, parts, strict=True):
        made = segment(plan_segment(path, model=str(model), name=name, scheme=scheme), run=run_serial).result
        found["before"].append(evaluate(path, clean_of(path)).figures.psnr_db)
        found["after"].append(evaluate(str(made.location), clean_of(path)).figures.psnr_db)
        blurred = [gaussian_filter(part.image, s) for s in (0.7, 1, 1.3, 1.6, 2, 2.5, 3)]
        about = {"patch_size": 5, "patch_distance": 6, "sigma": NOISE}
        averaged = [denoise_nl_means(part.image, h=h * NOISE, **about) for h in (0.4, 0.6, 0.8)]
        for kind, tries in (("gaussian", blurred), ("nl_means", averaged)):
            psnr = [Deviations.of(each[None], part.truth[None]).figures().psnr_db for each in tries]
            found[kind].append(max(psnr))
    return {f"psnr_{kind}_db": float(np.mean(each)) for kind, each in found.items()}


def inside(instances, image):
    """Return where instances are, without the gaps between those that touch, as the training sees them."""
    n = instances.ndim
    dims = 2 if n == 2 or len(image.spatial_shape) != n else 3
    return np.asarray(Separated(instances, tuple(range(n - dims, n)), None)[(slice(None),) * n])


def cpu_s():
    """Return the processor time of this process so far, on all cores, seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    begin = time.perf_counter()
    main()
    print(f"{time.perf_counter() - begin:.0f} s")
