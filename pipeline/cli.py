"""The command ``haloseg``: parse, call a verb, print.

Exit codes: 0 done; 1 the run failed, or a result was not verified; 2 bad arguments or bad input; 130 interrupted.
Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from keyword import iskeyword
from typing import NoReturn

from rich.logging import RichHandler

from pipeline import commands, interrupts
from pipeline.console import STDERR, show
from pipeline.errors import InputError, PipelineError
from pipeline.interrupts import INTERRUPTS

_NEGATIVE_LIST = re.compile(r"-[\d.][\d.e+-]*(,[\d.e+-]+)+")  # which argparse takes for an option
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given, known = list(sys.argv[1:] if arguments is None else arguments), parser()
    if "" in given:  # else an unset variable of the shell would stand for the folder that one is in
        known.error("an argument must not be empty, got ''; name what is meant")
    args = known.parse_args(_joined(given))
    handler = RichHandler(logging.WARNING, console=STDERR, show_time=False, show_path=False, show_level=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s", force=True)
    for name in ("distributed", "asyncio"):  # not tifffile, whose complaints tell of damage
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with INTERRUPTS.raised():
        try:
            return _run(args)
        except KeyboardInterrupt:
            return _fail(interrupts.LINE, interrupts.CODE)
        except Exception as error:
            if INTERRUPTS.came:  # what a library made of it
                return _fail(interrupts.LINE, interrupts.CODE)
            if (code := _told(error)) is None:
                raise
            return code


def _run(args: argparse.Namespace) -> int:
    show(document := args.run(args), as_json=args.json)
    sys.stdout.flush()
    return 0 if document.get("verified") is not False else 1


def _told(error: Exception) -> int | None:
    """Say in one line what a caller can act on, and return the exit code; None of a mistake of ours."""
    if isinstance(error, PipelineError):
        return _fail(str(error), 2 if isinstance(error, InputError) else 1)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError):
        return _fail(f"storage must answer, got {error}; mend it and run the same command again", 1)
    return None


def _joined(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, those of options that begin with a negative number behind their "="."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1].startswith("--") and _NEGATIVE_LIST.fullmatch(argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"haloseg: {' '.join(message.split())}\n")
    return code


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = _Parser(prog="haloseg", description="Seamless U-Net segmentation of scans larger than memory.")
    top.add_argument("--version", action="version", version=f"haloseg {version('haloseg')}")
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON document on stdout, and nothing else there")
    cluster = _Parser(add_help=False)
    cluster.add_argument(
        "--cluster", default="local", metavar="local|ADDRESS", help="run here, or on a Dask scheduler (tcp://host:8786)"
    )
    workers_help = "processes (default: the GPUs or cores, if it is worth it); of a cluster: to share among"
    cluster.add_argument("--workers", type=_positive, metavar="N", help=workers_help)
    verbs = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def verb(name: str, help_text: str, *parents: _Parser) -> _Parser:
        added = verbs.add_parser(name, help=help_text, description=help_text, parents=[common, *parents])
        added.set_defaults(run=getattr(commands, f"{name}_" if iskeyword(name) else name))
        return added

    demo = verb("demo", "the main job on the scan that ships: ingest, segment, evaluate, picture")
    demo.add_argument("folder", nargs="?", default="haloseg-demo", metavar="DIR")
    _add_ingest(verb("ingest", "make the OME-Zarr image of a scan, or a label volume of an image", cluster))
    verb("info", "tell what a scan, an image, labels or a prediction are").add_argument("path", metavar="PATH")
    _add_train(verb("train", "train a U-Net on images and their labels, or on pairs of images"))
    ensemble = verb("ensemble", "make one model of several networks that were trained alike, the mean of what they say")
    ensemble.add_argument("models", nargs="+", metavar="MODEL", help="names or files, two or more")
    ensemble.add_argument("--model", required=True, metavar="NAME|FILE", help="the model: a name, or a file to write")
    _add_import(verb("import", "make a model of a network from elsewhere, with its tile rule measured"))
    export = verb("export", "write a model as a package of bioimage.io, for other programs")
    export.add_argument("model", metavar="MODEL")
    export.add_argument("--bioimageio", required=True, metavar="ZIP", help="the package to write")
    export.add_argument("--name", metavar="NAME", help="the model's name (default: its file's)")
    export.add_argument("--author", action="append", default=[], metavar="NAME", help="once for each")
    export.add_argument("--licence", metavar="SPDX", help="such as CC-BY-4.0")
    verb("inspect", "tell what a model is, and measure its tile rule").add_argument("model", metavar="MODEL")
    plan_help = "tell what segment would do: columns, arithmetic, bytes, memory; runs nothing"
    _add_plan(plan := verb("plan", plan_help), "an image; make it of a scan with ingest")
    plan.add_argument("--calibrate", action="store_true", help="time a few slabs here, and tell how long; not of tiles")
    plan.add_argument("--workers", type=_positive, metavar="N", help=workers_help)
    segment_help = "make the label volume, or the prediction, that the network gives on the whole scan"
    segment_image = "an image, or a scan that segment ingests beside itself first"
    _add_plan(segment := verb("segment", segment_help, cluster), segment_image)
    name_help = "IMAGE/labels/NAME, or IMAGE/predictions/NAME of a network trained with --target"
    segment.add_argument("--name", required=True, metavar="NAME", help=name_help)
    instances_help = "then make IMAGE/labels/NAME, too, as stitch does: an id for each object"
    segment.add_argument("--instances", metavar="NAME", help=instances_help)
    _add_stitch(verb("stitch", "make instances of class labels: each object gets an id of its own", cluster))
    _add_verify(verb("verify", "compute sampled boxes of a result again and tell the difference", cluster))
    evaluate_help = "compare with the truth: labels by Dice, Jaccard, accuracy; values by MAE, RMSE, PSNR"
    _add_evaluate(verb("evaluate", evaluate_help))
    return top


def _add_evaluate(verb: argparse.ArgumentParser) -> None:
    volumes_help = "IMAGE.zarr/labels/NAME or a scan of integers; or IMAGE.zarr/predictions/NAME, an image, or a scan"
    overlap_help = "; or IMAGE.zarr/probabilities/NAME of labels that overlap"
    verb.add_argument("predicted", metavar="PREDICTED", help=volumes_help + overlap_help)
    truths_help = f"{volumes_help}; of labels that overlap one for each, in their order, not zero where the label is"
    verb.add_argument("truths", nargs="+", metavar="TRUTH", help=truths_help)
    ignore_help = "voxels with this value in the truth do not count, such as those that nobody has labelled"
    verb.add_argument("--ignore", type=int, metavar="VALUE", help=ignore_help)
    channel_help = "which labels that overlap the truths are of, by name (default: all)"
    verb.add_argument("--channel", type=_words, default=(), metavar="NAME[,NAME]", help=channel_help)
    threshold_help = "which the probability of a label that overlaps others must exceed (default 0.5)"
    verb.add_argument("--threshold", type=float, metavar="P", help=threshold_help)


def _add_ingest(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("scan", metavar="SCAN", help="TIFF, OME-TIFF, PNG, JPEG, folder of slices, HDF5, .npy, Zarr")
    verb.add_argument("image", nargs="?", metavar="IMAGE", help="the OME-Zarr image to make, such as scan.zarr")
    verb.add_argument("--voxel-size-um", type=_floats, metavar="Z,Y,X", help="micrometres per voxel, one per axis")
    verb.add_argument("--chunk", type=_integers, metavar="N[,N,N]", help="voxels that can be read alone")
    verb.add_argument("--shard", type=_integers, metavar="N[,N,N]", help="voxels that are written whole: one block")
    verb.add_argument("--overwrite", action="store_true", help="delete the image at IMAGE first, with its labels")
    verb.add_argument("--labels-of", metavar="IMAGE", help="make a label volume of this image instead")
    verb.add_argument("--name", metavar="NAME", help="the label volume's name, with --labels-of")


def _add_train(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("images", nargs="+", metavar="IMAGE")
    learnt = verb.add_mutually_exclusive_group(required=True)
    labels_help = "the label volume of each image to learn from, or several that may overlap"
    learnt.add_argument("--labels", metavar="NAME[,NAME]", help=labels_help)
    target_help = "instead: images to be made of IMAGE..., then of --held-out, by l1 or l2 (default recipe: regression)"
    learnt.add_argument("--target", nargs="+", default=[], metavar="IMAGE", help=target_help)
    made = verb.add_mutually_exclusive_group(required=True)
    made.add_argument("--model", metavar="NAME|FILE", help="the model: a name, or a file to write (.safetensors)")
    made.add_argument("--preview", metavar="PNG", help="a picture of augmented patches to write; trains nothing")
    verb.add_argument("--recipe", metavar="NAME|TOML", help="one that ships, such as membrane2d, or a file")
    verb.add_argument(
        "--held-out", nargs="+", default=[], metavar="IMAGE", help="images to validate on, whole, not to learn from"
    )
    verb.add_argument("--minutes", type=_positive_float, metavar="M", help="stop after so many, all members together")
    verb.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    verb.add_argument("--seed", type=int, default=0, metavar="N")
    members_help = "so many networks, of seeds that follow each other, as one model: an ensemble (default 1)"
    verb.add_argument("--members", type=_positive, default=1, metavar="N", help=members_help)
    verb.add_argument(
        "--processes", type=_positive, metavar="N", help="share each batch among so many (default: the GPUs; CPU: 1)"
    )
    verb.add_argument("--tensorboard", metavar="DIR", help="a folder for a log that TensorBoard shows")


def _add_import(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("network", metavar="FILE", help="program (.pt2), package (.zip, rdf.yaml) or smp:NAME")
    verb.add_argument("--model", required=True, metavar="NAME|FILE", help="the model: a name, or a file to write")
    verb.add_argument("--classes", type=_words, default=(), metavar="A,B,..", help="names, none first with a sigmoid")
    verb.add_argument("--channels", type=_words, default=(), metavar="A,B,..", help="names of the image's channels")
    how = "zscore (default), percentile, range or none, per scan; zscore-slicewise, per slice of a volume"
    verb.add_argument("--normalisation", metavar="HOW", help=how)
    verb.add_argument("--mean", type=_numbers, default=(), metavar="X,..", help="then subtracted, one per channel")
    verb.add_argument("--std", type=_floats, default=(), metavar="X,..", help="then divided by, one per channel")
    verb.add_argument("--voxel-size-um", type=_floats, metavar="Z,Y,X", help="of the images that it learned from")
    verb.add_argument(
        "--head", choices=("softmax", "sigmoid", "linear"),
        help="what its logits need (default: what it ends in); linear: nothing, they are intensities",
    )  # fmt: skip
    verb.add_argument("--output-std", type=_floats, default=(), metavar="X,..", help="of a linear head: times this")
    verb.add_argument("--output-mean", type=_numbers, default=(), metavar="X,..", help="of a linear head: plus this")
    verb.add_argument("--encoder", metavar="NAME", help="of a network of smp, such as resnet34")
    verb.add_argument("--weights", metavar="FILE", help="of a network of smp: its state dict, or random to try it")
    verb.add_argument("--in-channels", type=_positive, default=3, metavar="N", help="of a network of smp (default 3)")
    verb.add_argument("--n-classes", type=_positive, default=2, metavar="N", help="of a network of smp (default 2)")
    verb.add_argument("--trust", action="store_true", help="run the code that a package of bioimage.io comes with")
    verb.add_argument("--output", type=int, default=0, metavar="N", help="which of several outputs, from 0")


def _add_plan(verb: argparse.ArgumentParser, image_help: str) -> None:
    verb.add_argument("image", metavar="IMAGE", help=image_help)
    verb.add_argument("--model", required=True, metavar="NAME|FILE", help="such as cells, cells@2, cells.safetensors")
    verb.add_argument("--tile", type=_integers, metavar="N[,N,N]", help="run by overlapping tiles of this size instead")
    verb.add_argument("--slab", type=_positive, metavar="N", help="rows that enter the network at once")
    verb.add_argument("--column", type=_integers, metavar="N[,N,N]", help="shards that are streamed as one column")
    verb.add_argument("--budget", type=_bytes, metavar="BYTES", help="memory of one worker (default 1G, on a GPU 4G)")
    verb.add_argument("--probabilities", action="store_true", help="write IMAGE/probabilities/NAME too, float32")
    verb.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    verb.add_argument("--engine", default="auto", choices=("auto", "reference", "fused"), help="what runs the network")
    verb.add_argument("--precision", default="float32", choices=("float32", "bf16", "fp16", "tf32"))
    verb.add_argument(
        "--tta", default="none", choices=("none", "flips", "rotations"),
        help="mean over the flipped scan, 4 or 8 times the work in 2-D or 3-D; rotations: twice as many",
    )  # fmt: skip


def _add_stitch(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("image", metavar="IMAGE")
    verb.add_argument("--labels", required=True, metavar="NAME", help="the class labels: IMAGE/labels/NAME")
    verb.add_argument("--name", required=True, metavar="NAME", help="the instances: IMAGE/labels/NAME")
    classes_help = "whose objects are wanted, by name or value (default: all but the first)"
    verb.add_argument("--classes", type=_words, default=(), metavar="A,B,..", help=classes_help)
    voxels_help = "leave out objects of fewer voxels (default 1)"
    verb.add_argument("--min-voxels", type=_positive, default=1, metavar="N", help=voxels_help)


def _add_verify(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("image", metavar="IMAGE")
    verb.add_argument("--name", required=True, metavar="NAME", help="the labels or the prediction of this name")
    verb.add_argument("--boxes", type=_positive, default=16, metavar="N", help="how many boxes (default 16)")
    verb.add_argument("--seed", type=int, default=1, metavar="N", help="which boxes (default 1)")
    verb.add_argument("--model", metavar="NAME|FILE", help="the model that made them, if it has been moved")
    verb.add_argument("--budget", type=_bytes, metavar="BYTES", help="memory of one worker (default 1G, on a GPU 4G)")
    verb.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return number


def _integers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _floats(text: str) -> tuple[float, ...]:
    return tuple(_positive_float(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 0.5,0.4, got {text}") from None


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"must be bytes such as 2000000000, 512M or 2G, got {text}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


if __name__ == "__main__":
    sys.exit(main())
