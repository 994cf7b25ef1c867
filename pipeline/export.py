"""Export: a model as a package of bioimage.io, for programs that know nothing of haloseg."""

from __future__ import annotations

import io
import re
import zipfile
from argparse import Namespace
from typing import Any

import numpy as np
import tifffile
import yaml
from numpy.typing import NDArray

from pipeline.errors import ArgumentError, ModelError
from pipeline.store.location import Location
from pipeline.store.shelf import called, model_path
from pipeline.unet.foreign.rdf import packaged
from pipeline.unet.model import load_model

# The earliest time that a zip knows: the same model is the same package.
_TIME = (1980, 1, 1, 0, 0, 0)


def export_bioimageio(
    model: str, out: str, *, name: str = "", authors: tuple[str, ...] = (), licence: str = ""
) -> dict[str, Any]:
    """Write a model file as a bioimage.io package, and return its description.

    Parameters
    ----------
    out : path of the .zip to write
    name : letters, digits, blanks, "-", "_" and "."; the model file's by default
    licence : by its SPDX identifier, such as CC-BY-4.0
    """
    if not out.endswith(".zip"):
        raise ArgumentError(f"a bioimage.io package must be a .zip, got {out}; name it so")
    name = name or re.sub(r"[^A-Za-z0-9_\- ()+]", "-", f"haloseg {called(model)}")
    if not re.fullmatch(r"[A-Za-z0-9_\- ()+]{5,128}", name):
        raise ArgumentError(f"a name must be 5 to 128 letters, digits, blanks or _-()+, got {name}; give --name")
    network = load_model(model)
    if network.target_windows:
        raise ModelError(f"a package must be of a network with classes, got a linear head in {model}; segment with it")
    if beside := network.settings.neighbours:
        raise ModelError(
            f"a package must be of a network that sees one slice at a time, got {beside} neighbours on each side in "
            f"{model}; segment with it"
        )
    package = packaged(
        network, name=name, authors=authors or ("unknown",), licence=licence, npy=_npy, tiff=_tiff
    )
    text = yaml.safe_dump(package.description, sort_keys=False, allow_unicode=True)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for file, data in {"rdf.yaml": text.encode(), **package.files}.items():
            archive.writestr(zipfile.ZipInfo(file, _TIME), data)
    Location(out).write_bytes(content.getvalue())
    return package.description


def command(args: Namespace) -> dict[str, Any]:
    """Export what the command line names."""
    description = export_bioimageio(
        model_path(args.model), args.bioimageio, name=args.name or "", authors=tuple(args.author),
        licence=args.licence or "",
    )
    weights = description["weights"]["torchscript"]
    return {
        "package": args.bioimageio, "name": description["name"], "format": f"model RDF {description['format_version']}",
        "weights": "torchscript", "weights_sha256": weights["sha256"],
    }  # fmt: skip


def _tiff(array: NDArray[Any]) -> bytes:
    content = io.BytesIO()
    tifffile.imwrite(content, array.squeeze(), photometric="minisblack", metadata=None, datetime=False)
    return content.getvalue()


def _npy(array: NDArray[Any]) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()
