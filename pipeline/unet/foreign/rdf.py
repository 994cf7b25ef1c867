"""What bioimage.io calls a model: a description (rdf.yaml, model RDF 0.5) beside weights and tensors to test them with.

https://github.com/bioimage-io/spec-bioimage-io. Its halo is our trim: what is cropped from each side of the output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import ArgumentError, ModelError
from pipeline.store.scaling import USUAL_PERCENTILES
from pipeline.store.statistics import Normalisation
from pipeline.unet.foreign.bioimageio import Package
from pipeline.unet.foreign.torchscript import traced
from pipeline.unet.model import Model, build, networks_of
from pipeline.unet.network import probabilities_of
from pipeline.unet.settings import Head
from pipeline.unet.turns import Mean

FORMAT = "0.5.4"
WEIGHTS, README = "weights.pt", "README.md"
Encode = Callable[[NDArray[Any]], bytes]
TOLERANCE = 1e-2  # of test outputs: percentiles and epsilons are not the same everywhere
EPS = 1e-6  # bioimage.io's own
_KINDS = (("test", "npy"), ("sample", "tif"))
_LEAST = {2: 128, 3: 32}  # voxels of the test tensors along each axis, at least


@dataclass(frozen=True, slots=True)
class Packaged:
    """A package's description, and its other files, by name."""

    description: dict[str, Any]
    files: dict[str, bytes]


def packaged(
    model: Model, *, name: str, authors: tuple[str, ...], licence: str, npy: Encode, tiff: Encode
) -> Packaged:
    """Return the package of a model.

    Parameters
    ----------
    licence : by its SPDX identifier; empty where nobody has given one
    npy, tiff : return an array as the bytes of such a file
    """
    weights, any_size = traced(model)
    contents = {WEIGHTS: weights, README: _readme(model, name).encode()}
    for end, array in _tensors(model, any_size).items():
        contents[f"test_{end}.npy"] = npy(array)
        if array.squeeze().ndim <= 3:  # of more axes the format's own reader makes pages
            contents[f"sample_{end}.tif"] = tiff(array)
    files = {file: {"source": file, "sha256": hashlib.sha256(data).hexdigest()} for file, data in contents.items()}
    inputs, outputs = (
        {f"{use}_tensor": files[f"{use}_{end}.{kind}"] for use, kind in _KINDS if f"{use}_{end}.{kind}" in files}
        for end in ("input", "output")
    )
    description = {
        "type": "model", "format_version": FORMAT, "name": name,
        "description": f"Semantic segmentation of {model.settings.dims}-D images, by haloseg.",
        "authors": [{"name": each} for each in authors], "license": licence or None, "documentation": files[README],
        "cite": [{"text": "Ronneberger et al. 2015, U-Net", "doi": "10.1007/978-3-319-24574-4_28"}],
        "tags": ["segmentation", f"{model.settings.dims}d", "haloseg", "pytorch", "torchscript"],
        "inputs": [_input(model, any_size) | inputs],
        "outputs": [_output(model, any_size) | outputs],
        "weights": {"torchscript": files[WEIGHTS] | {"pytorch_version": torch.__version__.partition("+")[0]}},
        "config": {"haloseg": _ours(model)},
    }  # fmt: skip
    kept = {key: value for key, value in description.items() if value is not None}
    return Packaged(kept, contents)


def check_test_output(model: Model, package: Package) -> None:
    """Refuse a model that does not give the test output of the package that it came from."""
    expected = package.test_output
    if expected is None:
        return
    with torch.no_grad():
        got = build(model, "cpu")(torch.from_numpy(_normalised(package.test_input, model)))
    likely = [each.numpy() for each in (got, probabilities_of(got, model.settings.head))]
    fit = [each for each in likely if each.shape == expected.shape]
    apart = min((float(np.abs(each - expected).max()) for each in fit), default=np.inf)
    if apart > TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ModelError(
            f"a package's test output must come out, got one that differs by {apart:.2g}; its description does not "
            "suffice: export its network with torch.export"
        )


def _axes(model: Model) -> str:
    return "zyx"[-model.settings.dims :]


def _input(model: Model, any_size: bool) -> dict[str, Any]:
    rule, least = model.rule, model.rule.tile_shape(model.rule.stride)
    sizes: list[Any] = [
        {"min": n, "step": s} if any_size else n for n, s in zip(least, rule.stride, strict=True)
    ]
    return {
        "id": "raw",
        "axes": [
            {"type": "batch"}, {"type": "channel", "channel_names": list(model.channels)},
            *({"type": "space", "id": a, "size": n, **_scale(model, at)}
              for at, (a, n) in enumerate(zip(_axes(model), sizes, strict=True))),
        ],
        "data": {"type": "float32"}, "preprocessing": [{"id": "ensure_dtype", "kwargs": {"dtype": "float32"}},
                                                      *_preprocessing(model)],
    }  # fmt: skip


def _output(model: Model, any_size: bool) -> dict[str, Any]:
    rule, least = model.rule, model.rule.tile_shape(model.rule.stride)
    space = []
    for at, (a, n, halo, trim) in enumerate(zip(_axes(model), least, rule.halo, rule.trim, strict=True)):
        loss = 2 * (halo - trim)
        size = {"tensor_id": "raw", "axis_id": a, "offset": -loss} if any_size or trim else n - loss
        cropped = {"halo": trim} if trim else {}
        space.append({"type": "space", "id": a, "size": size, **cropped, **_scale(model, at)})
    names = model.classes if model.settings.head is Head.SOFTMAX else model.classes[1:]
    return {
        "id": "probabilities",
        "axes": [{"type": "batch"}, {"type": "channel", "channel_names": list(names)}, *space],
        "data": {"type": "float32", "range": [0.0, 1.0]},
    }  # fmt: skip


def _scale(model: Model, axis: int) -> dict[str, Any]:
    if model.voxel_size_um is None:
        return {}
    return {"scale": model.voxel_size_um[-model.settings.dims :][axis], "unit": "micrometer"}


def _preprocessing(model: Model) -> list[dict[str, Any]]:
    """Return the normalisation; over the whole image, if the reader of the package has it whole.

    What a 2-D package calls an image is one slice, so of it alone.
    """
    each = {"axes": list(_axes(model)), "eps": EPS}
    match model.normalisation:
        case Normalisation.ZSCORE | Normalisation.ZSCORE_SLICEWISE:
            return [{"id": "zero_mean_unit_variance", "kwargs": each}]
        case Normalisation.PERCENTILE:
            low, high = _percentiles(model)
            return [{"id": "scale_range", "kwargs": each | {"min_percentile": low, "max_percentile": high}}]
        case Normalisation.RANGE:
            return [{"id": "scale_range", "kwargs": each}]
        case Normalisation.WINDOW if len(model.limits) == 1:
            ((low, high),) = model.limits
            linear = {"gain": 1 / (high - low), "offset": -low / (high - low)}
            return [{"id": "clip", "kwargs": {"min": low, "max": high}}, {"id": "scale_linear", "kwargs": linear}]
        case Normalisation.WINDOW | Normalisation.DTYPE:
            raise ArgumentError(
                f"bioimage.io has no word for normalisation {model.normalisation} of {len(model.channels)} channels; "
                "train with zscore, or with one window"
            )
        case _:
            return []


def _tensors(model: Model, any_size: bool) -> dict[str, NDArray[np.float32]]:
    """Return smooth noise as an instrument might deliver it, and the network's probabilities of it."""
    rule, settings = model.rule, model.settings
    core = [s * (-(-_LEAST[settings.dims] // s) if any_size else 1) for s in rule.stride]
    shape = (1, settings.in_channels, *rule.tile_shape(tuple(core)))
    noise = np.random.default_rng(0).normal(size=shape)
    for axis in range(2, noise.ndim):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, 2, axis)
    raw = np.clip(np.rint(noise / noise.std() * 40 + 128), 0, 255).astype(np.float32)
    with torch.no_grad():
        logits = Mean(networks_of(model, "cpu"), settings)(torch.from_numpy(_normalised(raw, model)))
        likely = probabilities_of(logits, settings.head).numpy()
    return {"input": raw, "output": np.ascontiguousarray(likely, np.float32)}


def _percentiles(model: Model) -> tuple[float, float]:
    return model.limits[0] if model.limits else USUAL_PERCENTILES


def _normalised(raw: NDArray[np.float32], model: Model) -> NDArray[np.float32]:
    """Return intensities as the description's preprocessing gives them."""
    space, how = tuple(range(2, raw.ndim)), model.normalisation
    if how is Normalisation.NONE:
        return raw
    if how in (Normalisation.ZSCORE, Normalisation.ZSCORE_SLICEWISE):
        low, width = raw.mean(space, np.float64, keepdims=True), raw.std(space, np.float64, keepdims=True)
    elif how is Normalisation.WINDOW:
        ((least, most),) = model.limits
        return np.asarray((raw.clip(least, most) - least) / (most - least), np.float32)
    else:
        ends = _percentiles(model) if how is Normalisation.PERCENTILE else (0, 100)
        low, high = np.percentile(raw.astype(np.float64), ends, axis=space, keepdims=True)
        width = high - low
    return np.asarray((raw - low) / (width + EPS), np.float32)


def _ours(model: Model) -> dict[str, Any]:
    """Return what bioimage.io has no word for."""
    return {
        "sha256": model.digest, "classes": list(model.classes), "class_values": list(model.class_values),
        "normalisation": model.normalisation.value, "head": model.settings.head.value,
        "rule": {"stride": list(model.rule.stride), "halo": list(model.rule.halo), "trim": list(model.rule.trim)},
    }  # fmt: skip


def _readme(model: Model, name: str) -> str:
    rule, settings, whole = model.rule, model.settings, "slice" if model.scaling.is_slicewise else "image"
    of = f"The mean of {model.n_networks} networks, each a" if model.n_networks > 1 else "A"
    return f"""# {name}

{of} {settings.dims}-D network with {settings.in_channels} input channels and the classes {", ".join(model.classes)}.

Its weights give probabilities. Intensities are normalised ({model.normalisation.value}) by statistics of the whole
{whole}, not of each tile. Tiles are exact, and show no seams, with a stride of {rule.stride} voxels, a halo of
{rule.halo} voxels around each core, mirrored outside the image, and {rule.trim} voxels cropped from each side of the
output; this was measured.

## Validation

Compare its labels with the truth on images that it has not learned from: `haloseg evaluate LABELS TRUTH`.
"""
