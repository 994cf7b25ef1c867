"""What each ingredient of the U-Net paper buys: a recipe as it ships, and with one ingredient less or more.

    python tests/benchmarks/bench_ingredients.py CASE ARM [--fold N] [--seed N] [--steps N] [--precision bf16]
        [--model FILE]

CASE is membrane2d (ISBI 2012, one fold of slices held back) or nuclei2d (DSB 2018 fluorescence, a fifth of the pictures
held back). ARM is one of

    recipe         as it ships, but for the number of steps
    no-elastic     without the elastic deformation
    border-weight  with the paper's weights between neighbours, w0 = 10, sigma = 5 voxels; membranes take the components
                   of the interior as the instances that these need, which leaves the classes as they are
    dropout        with the paper's dropout, 0.5 at the end of the contracting path
    mirrored       with valid padding, the context beyond a scan mirrored, while it learns and afterwards
    zeros          the same with zeros, the mean of the intensities, instead of mirrored voxels, at both times

The last two have depth 3 and three patches of 192 x 192 per step, so that a step takes about as long; compare them with
each other. Of "recipe", which keeps the size, each figure is also told as it is when the network that has learnt takes
every slice without context, as is usual: its convolutions see zeros beyond the border.

What is compared was never learnt from, and did not choose the weights. Figures whose names end in "_border" are of the
voxels within 32 of a scan's border. One row for each run goes to rows.jsonl in ``--folder``.
"""

import argparse
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from bench_recipes import cpu_s, images_of, nuclei
from bench_training_peers import slices
from boundaries import boundary_scores
from scipy.ndimage import label as components

from pipeline.config import Precision
from pipeline.geometry.box import Box
from pipeline.lesson import open_lesson
from pipeline.unet.model import build, load_model
from pipeline.unet.network import UNet
from pipeline.unet.numbers import exactly
from pipeline.unet.settings import Padding, closed_form_rule
from pipeline.unet.training.fit import fit
from pipeline.unet.training.recipe import load_recipe
from pipeline.unet.training.source import Source
from pipeline.unet.training.validation import cores
from pipeline.unet.training.warp import batch_of

N_VALIDATIONS = 5
NEAR_BORDER = 32
WHOLE = 2**16
VALID = {"padding": Padding.VALID, "depth": 3, "patch": 192, "batch": 3}
ARMS = {
    "recipe": {}, "no-elastic": {}, "border-weight": {"border_weight": 10.0}, "dropout": {"dropout": 0.5},
    "mirrored": VALID, "zeros": VALID,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ZerosBeyond(Source):
    """A source that shows zeros outside the image instead of mirrored voxels."""

    def intensities(self, box, turn=None):
        """Return what the network sees of a box of the image's voxels, (channels, *box.shape)."""
        inside = box.intersect(Box.whole(self.image.shape[1:]))
        x = np.zeros((len(self.image), *box.shape), np.float32)
        x[(slice(None), *inside.inside(box))] = Source.intensities(self, inside)
        return x if turn is None else turn.apply(x)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("membrane2d", "nuclei2d"))
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--precision", type=Precision, choices=Precision, default=Precision.FLOAT32)
    parser.add_argument("--model", help="that has learnt so already, such as bench_training_peers.py left in --folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("build/bench/training"))
    args = parser.parse_args()
    recipe = replace(
        load_recipe(args.case), instances=True, steps=args.steps, validate_every=-(-args.steps // N_VALIDATIONS),
        precision=args.precision, **ARMS[args.arm],
    )  # fmt: skip
    if args.arm == "no-elastic":
        recipe = replace(recipe, augmentation=replace(recipe.augmentation, elastic_sigma_voxels=0.0))
    learn, check, test, truths, labels = data_of(args.case, args.folder, args.fold)
    lesson = open_lesson(learn, labels=labels, recipe=recipe, held_out=check)
    tested = open_lesson(learn, labels=labels, recipe=recipe, held_out=test).check
    taught, checked = lesson.learn, lesson.check
    if args.arm == "zeros":
        taught, checked, tested = (without_mirror(each) for each in (taught, checked, tested))
    row = {each: getattr(args, each) for each in ("case", "arm", "fold", "seed", "steps")}
    if args.model:
        network = build(load_model(args.model), args.device)
    else:
        begin = cpu_s()
        fitted = fit(
            lesson.settings, taught, validation=checked, recipe=recipe, device=args.device, seed=args.seed,
            on_progress=lambda now: print(f"step {now.step}: {now.loss:.4f}, {now.told}", flush=True),
        )  # fmt: skip
        row |= {
            "precision": str(args.precision), "best_step": fitted.best.step, "held_out_loss": fitted.best.loss,
            "train_cpu_s": cpu_s() - begin,
        }  # fmt: skip
        network = UNet(lesson.settings)
        network.load_state_dict(fitted.weights)
        network.to(args.device).eval()
    halo = closed_form_rule(lesson.settings).halo
    row |= figures(args.case, segmented(network, tested, halo=halo, device=args.device), truths)
    if args.arm == "recipe":
        bare = segmented(network, without_mirror(tested), halo=(0, 0), device=args.device)
        row |= {f"{name}_without_context": value for name, value in figures(args.case, bare, truths).items()}
    with (args.folder / "ingredients.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


def data_of(case, folder, fold):
    """Return the images to learn from, to choose weights, to compare on; the truth slice by slice; and its labels."""
    if case == "membrane2d":
        learn, test = slices(folder, fold)
        return learn, [], [image for image, _ in test], [each for _, part in test for each in part.truth], "cells"
    sides = nuclei(Path(os.environ["HALOSEG_DATA"]), fold, "gray_dark", 1)
    folder.mkdir(parents=True, exist_ok=True)
    return *(images_of(parts, folder) for parts in sides), [part.truth for part in sides[-1]], "truth"


def without_mirror(patches):
    """Return the same patches of sources that show zeros outside the images."""
    names = Source.__dataclass_fields__
    made = (ZerosBeyond(**{name: getattr(source, name) for name in names}) for source in patches.sources)
    return replace(patches, sources=tuple(made))


def segmented(network, patches, *, halo, device):
    """Yield (probability of class 0, classes of the truth) of every slice in the regions of the patches, whole."""
    rule = closed_form_rule(network.settings)
    for source in patches.sources:
        across = source.region.ndim - rule.ndim
        over = rule.over_slices() if across else rule
        for core in cores(source.seen, over, largest=(*(1,) * across, *(WHOLE,) * rule.ndim)):
            seen = replace(patches, core=core.shape, halo=(*(0,) * across, *halo))
            batch = batch_of([seen.at(source, core)], device=device)
            with torch.inference_mode(), exactly():
                logits = network(batch.images)
            for axis, (n, size) in enumerate(zip(logits.shape[2:], core.shape[across:], strict=True), start=2):
                logits = logits.narrow(axis, (n - size) // 2, size)
            shown = tuple(slice(n) for n in source.region.shape[across:])
            likely, classes = logits.softmax(dim=1)[0, 0], batch.classes[0]
            yield likely[shown].cpu().numpy(), classes[shown].cpu().numpy()


def figures(case, found, truths):
    """Return the figures of one network; ``truths`` are the labels as they are, slice by slice."""
    found = list(found)
    got, want = ([a < 0.5 for a, _ in found], [b == 1 for _, b in found])
    near = [near_border(each.shape) for each in want]
    border = ([a[n] for a, n in zip(side, near, strict=True)] for side in (got, want))
    if case == "nuclei2d":
        return {
            "dice": dice(got, want), "dice_border": dice(*border),
            "f1": found_again(got, truths),
        }  # fmt: skip
    v_rand, v_info = boundary_scores(np.stack([a for a, _ in found]), np.stack(want))
    error, error_border = (np.mean([(a != b).mean() for a, b in pairs]) for pairs in (
        list(zip(got, want, strict=True)), list(zip(*border, strict=True)),
    ))  # fmt: skip
    return {
        "pixel_error": float(error), "pixel_error_border": float(error_border), "v_rand": v_rand, "v_info": v_info,
        "dice": dice([~each for each in got], [~each for each in want]),
    }  # fmt: skip


def dice(got, want):
    """Return the overlap over all slices together."""
    both = sum(int((a & b).sum()) for a, b in zip(got, want, strict=True))
    return 2 * both / sum(int(a.sum()) + int(b.sum()) for a, b in zip(got, want, strict=True))


def near_border(shape):
    """Return where a slice's border is near."""
    near = np.ones(shape, bool)
    near[NEAR_BORDER:-NEAR_BORDER, NEAR_BORDER:-NEAR_BORDER] = False
    return near


def found_again(got, truths):
    """Return F1 of the instances: a component of what was found is right if its IoU with one of the truth is over 0.5.

    No two can be right about the same instance.
    """
    right = n = 0
    for mask, truth in zip(got, truths, strict=True):
        names, true = np.unique(truth, return_inverse=True)
        found, n_found = components(mask)
        joint = np.zeros((n_found + 1, len(names)), np.int64)
        np.add.at(joint, (found, true.reshape(truth.shape)), 1)
        union = joint.sum(1, keepdims=True) + joint.sum(0, keepdims=True) - joint
        right += int((joint / union > 0.5)[1:, names != 0].sum())
        n += n_found + int((names != 0).sum())
    return 2 * right / n


if __name__ == "__main__":
    main()
