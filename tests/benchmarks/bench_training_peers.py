"""Our usual training of membranes beside the U-Net paper's and MONAI's: same slices, same voxels, same device.

    python tests/benchmarks/bench_training_peers.py ARM [--fold N] [--seed N] [--steps N] [--width N]
        [--tta none flips] [--precision bf16] [--device cuda]

ARM is one of

    membrane2d     our recipe as it ships, but for the number of steps
    unet2015       our recipe of the paper, in its width of 64 unless told; one step shows it 384 x 384 voxels; the rate
                   rises over a tenth of the steps where that is less than the recipe says, which the paper does not
    monai          MONAI's BasicUNet of our width, which has about as many weights, DiceCELoss, AdamW with a cosine
    monai-default  the same with BasicUNet's own features (32, 32, 64, 128, 256, 32)

``--steps`` are of 8 patches of 128 x 128 voxels; ``unet2015`` takes as many as show it as many labelled voxels.
All learn from the same slices of ISBI 2012, keep the weights of lowest loss over the same whole slices, which they do
not learn from, at five times of the training, and are compared on the slices of the fold, whole, that none has seen.
Ours are segmented as the command line does, by each ``--tta`` in turn, MONAI's by its sliding_window_inference with
half overlap, Gaussian, which passes each voxel through the network four times, as ``--tta flips`` does.

MONAI's changes of patches are its own transforms with usual values: flips, right-angle turns, Rand2DElastic (out of
larger crops, so that no patch shows anything from beyond a crop), intensities scaled and shifted, noise. What it has
for determinism is on. One row for each run, and each ``--tta``, goes to rows.jsonl in ``--folder``.
"""

import argparse
import json
import os
import time
from copy import deepcopy
from dataclasses import replace
from math import ceil
from pathlib import Path

import numpy as np
import tifffile
import torch
import zarr
from bench_recipes import cpu_s, images_of, membranes
from boundaries import boundary_scores, challenge_error
from scipy.ndimage import label as components

from pipeline.compute.runner import run_serial
from pipeline.config import Precision, Scheme, Tta
from pipeline.ingest import ingest_labels
from pipeline.lesson import open_lesson
from pipeline.plan import plan_segment
from pipeline.segment import segment
from pipeline.train import train
from pipeline.unet.training.recipe import load_recipe

N_VALIDATIONS = 5
PATCH, BATCH = 128, 8
CROP = 192  # of MONAI's patches before they are turned by up to 45 degrees
KEYS = ("image", "label")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=("membrane2d", "unet2015", "monai", "monai-default"))
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of MONAI's networks")
    parser.add_argument("--tta", type=Tta, choices=Tta, nargs="+", default=[Tta.NONE], help="of our networks")
    parser.add_argument("--precision", type=Precision, choices=Precision, default=Precision.FLOAT32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("build/bench/training"))
    args = parser.parse_args()
    learn, test = slices(args.folder, args.fold)
    arm = monai_arm if args.arm.startswith("monai") else our_arm
    row = {each: getattr(args, each) for each in ("arm", "fold", "seed", "steps")} | {"precision": str(args.precision)}
    for found in arm(args, learn, test):
        with (args.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row | found) + "\n")
        print(json.dumps(row | found), flush=True)


def slices(folder, fold):
    """Return the images to learn from, and those to compare on with their parts; with instances as labels, too."""
    learn, _, test = membranes(Path(os.environ["HALOSEG_DATA"]), fold)
    folder.mkdir(parents=True, exist_ok=True)
    for part, image in zip(learn + test, images_of(learn + test, folder), strict=True):
        if not (Path(image) / "labels" / "cells").exists():
            scan = folder / "cells.tif"
            tifffile.imwrite(scan, np.stack([cells(truth) for truth in part.truth]), photometric="minisblack")
            ingest_labels(str(scan), image=image, name="cells")
            scan.unlink()
    return images_of(learn, folder), list(zip(images_of(test, folder), test, strict=True))


def cells(truth):
    """Return the components of one slice's interior, uint32; cells that meet at a corner are one."""
    return components(truth > 0, structure=np.ones((3, 3)))[0].astype(np.uint32)


def our_arm(args, learn, test):
    recipe, steps, cells_as = load_recipe(args.arm), args.steps, {"membrane2d": "truth", "unet2015": "cells"}
    if args.arm == "unet2015":
        steps = ceil(args.steps * BATCH * PATCH**2 / (recipe.batch * recipe.patch**2))
    recipe = replace(
        recipe, steps=steps, validate_every=ceil(steps / N_VALIDATIONS), width=args.width or recipe.width,
        warm_up_steps=min(recipe.warm_up_steps, steps // 10), precision=args.precision,
    )  # fmt: skip
    model = args.folder / f"{args.arm}-{recipe.width}-{args.fold}-{args.seed}-{steps}.safetensors"
    model.unlink(missing_ok=True)  # what an earlier run of the benchmark made would be kept, and take no time
    begin, begin_cpu = time.perf_counter(), cpu_s()
    result = train(
        learn, labels=cells_as[args.arm], model=str(model), recipe=recipe, seed=args.seed, device=args.device,
        on_progress=lambda now: print(f"step {now.step}: {now.loss:.4f}, {now.told}", flush=True),
    )  # fmt: skip
    told = {
        "own_steps": steps, "best_step": result.best.step, "held_out_loss": result.best.loss,
        "parameters": result.to_json()["parameters"],
        "train_s": time.perf_counter() - begin, "train_cpu_s": cpu_s() - begin_cpu,
    }  # fmt: skip
    for tta in args.tta:
        found = []
        for image, part in test:
            scheme, name = Scheme(device=args.device, tta=tta), f"{model.stem}-{tta}"
            plan = plan_segment(image, model=str(model), name=name, probabilities=True, scheme=scheme)
            segment(plan, run=run_serial)
            found.append((np.asarray(zarr.open_array(str(plan.probabilities.location / "0"), mode="r")[0]), part))
        yield told | {"tta": tta.value} | scores(found)


def scores(found):
    """Return the figures of (probability of a membrane, part), all over whole slices."""
    (likely, part), = found
    v_rand, v_info = boundary_scores(likely, part.truth > 0)
    got, want = likely >= 0.5, part.truth == 0
    return {
        "v_rand": v_rand, "v_info": v_info, "pixel_error": float((got != want).mean()),
        "challenge_pixel_error": float(challenge_error(likely, part.truth > 0)),
        "dice_membrane": float(2 * (got & want).sum() / (got.sum() + want.sum())),
    }  # fmt: skip


def monai_arm(args, learn, test):
    from monai.networks.nets import BasicUNet
    from monai.utils import set_determinism

    set_determinism(args.seed)
    width = args.width or 16
    features = (width, *(width * 2**level for level in range(1, 5)), width)
    features = (32, 32, 64, 128, 256, 32) if args.arm == "monai-default" else features
    network = BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=features).to(args.device)
    begin, begin_cpu = time.perf_counter(), cpu_s()
    loss, step, weights = fit_monai(network, args, *whole_slices(learn))
    told = {
        "own_steps": args.steps, "best_step": step, "held_out_loss": loss, "features": features,
        "learning_rate": args.learning_rate, "parameters": sum(each.numel() for each in network.parameters()),
        "train_s": time.perf_counter() - begin, "train_cpu_s": cpu_s() - begin_cpu,
    }  # fmt: skip
    network.load_state_dict(weights)
    found = []
    for _, part in test:
        logits = [inferred(network, normalised(each)[None], args.device) for each in part.image]
        found.append((torch.cat(logits).softmax(dim=1)[:, 0].cpu().numpy(), part))
    yield told | scores(found)


def fit_monai(network, args, learnt, checked):
    """Train the network; returns the lowest loss over the slices to check on, its step, and the weights there."""
    from monai.losses import DiceCELoss

    compare, every = DiceCELoss(to_onehot_y=True, softmax=True), ceil(args.steps / N_VALIDATIONS)
    optimiser = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.steps)
    drawn, best = patches(learnt, args.seed), (np.inf, 0, {})
    truth = [torch.as_tensor(each["label"])[None].to(args.device) for each in checked]
    for step in range(1, args.steps + 1):
        images, labels = (each.to(args.device) for each in next(drawn))
        network.train()
        optimiser.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision is Precision.BF16):
            logits = network(images)
        compare(logits.float(), labels).backward()
        optimiser.step()
        schedule.step()
        if step % every == 0 or step == args.steps:
            logits = [inferred(network, each["image"], args.device) for each in checked]
            loss = float(np.mean([float(compare(*pair)) for pair in zip(logits, truth, strict=True)]))
            print(f"step {step}: {loss:.4f}", flush=True)
            best = (loss, step, deepcopy(network.state_dict())) if loss < best[0] else best
    return best


def whole_slices(learn):
    """Return the slices that our training learns from, and those that choose its weights, as MONAI takes them."""
    lesson = open_lesson(learn, labels="truth", recipe=load_recipe("membrane2d"))
    sides = []
    for patches_of in (lesson.learn, lesson.check):
        slabs = [(s.image[0][s.region.slices], s.labels[s.region.slices]) for s in patches_of.sources]
        pairs = [pair for image, labels in slabs for pair in zip(image, labels, strict=True)]
        each = [{"image": normalised(a)[None], "label": (b[None] > 0).astype(np.float32)} for a, b in pairs]
        sides.append(each)
    return sides


def normalised(image):
    """Return a slice with mean 0 and deviation 1, as NormalizeIntensity has it; float32."""
    from monai.transforms import NormalizeIntensity

    return np.asarray(NormalizeIntensity()(image.astype(np.float32)))


def patches(slices, seed):
    """Yield batches (images, labels) of changed patches, without end."""
    from monai.transforms import (
        Compose,
        Rand2DElasticd,
        RandFlipd,
        RandGaussianNoised,
        RandRotate90d,
        RandScaleIntensityd,
        RandShiftIntensityd,
        RandSpatialCropd,
    )

    change = Compose([
        RandSpatialCropd(KEYS, roi_size=(CROP, CROP), random_size=False),
        RandFlipd(KEYS, prob=0.5, spatial_axis=0),
        RandFlipd(KEYS, prob=0.5, spatial_axis=1),
        RandRotate90d(KEYS, prob=0.5, max_k=3),
        Rand2DElasticd(
            KEYS, spacing=(30, 30), magnitude_range=(5, 6), prob=0.5, rotate_range=(np.pi / 4,),
            scale_range=(0.2, 0.2), spatial_size=(PATCH, PATCH), mode=("bilinear", "nearest"),
            padding_mode="reflection",
        ),
        RandScaleIntensityd("image", factors=0.1, prob=1.0),
        RandShiftIntensityd("image", offsets=0.1, prob=1.0),
        RandGaussianNoised("image", prob=0.5, std=0.1),
    ])  # fmt: skip
    change.set_random_state(seed)
    rng = np.random.default_rng(seed)
    while True:
        drawn = [change(slices[at]) for at in rng.integers(len(slices), size=BATCH)]
        yield tuple(torch.stack([torch.as_tensor(each[key]) for each in drawn]) for key in KEYS)


def inferred(network, image, device):
    """Return the logits of a slice (1, y, x), shape (1, 2, y, x), float32."""
    from monai.inferers import sliding_window_inference

    network.eval()
    x = torch.as_tensor(image)[None].to(device)
    with torch.inference_mode():
        return sliding_window_inference(x, (PATCH, PATCH), BATCH, network, overlap=0.5, mode="gaussian")


if __name__ == "__main__":
    main()
