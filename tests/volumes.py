"""What the tests of whole verbs share: small scans, small networks, and the whole-scan oracle."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import tifffile
import torch

from pipeline.store.location import Location
from pipeline.store.scaling import Window
from pipeline.store.statistics import Normalisation
from pipeline.unet.model import Model, build, load_model, save_model
from pipeline.unet.network import UNet, probabilities_of
from pipeline.unet.settings import Padding, UNetSettings, closed_form_rule


def scan_file(path, shape, *, seed=0, dtype=np.uint8):
    """Write a smooth random scan as TIFF and return its voxels."""
    noise = np.random.default_rng(seed).normal(size=shape)
    for axis in range(-min(len(shape), 3), 0):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, 2, axis)
    voxels = np.clip(noise / max(noise.std(), 1e-9) * 40 + 128, 0, 255).astype(dtype)
    tifffile.imwrite(path, voxels, photometric="minisblack")
    return voxels


def model_file(path, settings=None, *, seed=0, **about):
    """Write a model with random weights whose classes are about equally frequent, and return its path."""
    settings = settings or UNetSettings(dims=3, width=2, depth=1, padding=Padding.SAME, n_convs=1)
    torch.manual_seed(seed)
    network = UNet(settings).eval()
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
        shape = closed_form_rule(settings).tile_shape((4 * settings.stride,) * settings.dims)
        logits = network(torch.randn(1, settings.in_channels, *shape))
        middle = logits.flatten(2).median(dim=2).values[0]
        network.head.bias -= middle
    fields = {
        "classes": tuple(f"class {i}" for i in range(settings.n_labels)),
        "class_values": tuple(range(settings.n_labels)),
        "normalisation": Normalisation.ZSCORE, "channels": tuple(map(str, range(settings.image_channels))),
        "voxel_size_um": None, "rule": closed_form_rule(settings), "training": {}, "weights": network.state_dict(),
    } | about  # fmt: skip
    save_model(Model(settings=settings, **fields), path)
    return str(path)


def whole_scan(voxels, model_path, statistics):
    """Return the probabilities of the network applied once to the whole mirrored scan, shape (classes, *spatial).

    ``voxels`` has the shape (channels, *spatial); a 2-D network takes the slices of a volume one by one, each with the
    neighbours that it sees.
    """
    model = load_model(model_path)
    n = model.settings.neighbours
    if voxels.ndim - 1 > model.settings.dims:
        beside = np.pad(voxels, [(0, 0), (n, n), (0, 0), (0, 0)], mode="reflect")
        every = (beside[:, z : z + 2 * n + 1].reshape(-1, *voxels.shape[2:]) for z in range(voxels.shape[1]))
        return np.stack([whole_scan(each, model_path, statistics) for each in every], axis=1)
    if model.normalisation is Normalisation.ZSCORE_SLICEWISE:
        windows = [(each.mean(), 1 / each.std() if each.std() else 1.0, -np.inf, np.inf) for each in voxels]
    else:
        windows = model.input_windows or model.scaling.windows(statistics, dtype=str(voxels.dtype))
        windows = [each for each in windows for _ in range(2 * n + 1)]
    windows = [Window(*each) for each in windows]
    seen = [np.clip((c.astype(np.float64) - o) * s, *ends) for c, (o, s, *ends) in zip(voxels, windows, strict=True)]
    scaled = np.stack(seen)
    rule = model.rule
    pad = [(0, 0)] + [
        (h, -n % s + h) for n, s, h in zip(voxels.shape[1:], rule.stride, rule.halo, strict=True)
    ]
    network = build(model, "cpu")
    with torch.inference_mode():
        mirrored = torch.from_numpy(np.pad(scaled, pad, mode="reflect").astype(np.float32))
        likely = probabilities_of(network(mirrored[None]), model.settings.head)[0].numpy()
    keep = tuple(slice(t, t + n) for n, t in zip(voxels.shape[1:], rule.trim, strict=True))
    return likely[(slice(None), *keep)]


def as_of_before(image, *, finished=True):
    """Make an image what an older haloseg made of the same scan, which measured no slices."""
    about = Location(str(image)) / "zarr.json"
    document = about.read_json()
    del document["attributes"]["haloseg"]["slices_sha256"]
    if not finished:
        document["attributes"]["haloseg"]["statistics"] = []
        del document["attributes"]["ome"]
        (image / ".histograms").mkdir()
        (image / ".histograms" / "0.npz").write_bytes(b"without slices")
    about.write_bytes(json.dumps(document, indent=2).encode())
    shutil.rmtree(image / "slices")


def n_whole(shards):
    """Return how many shards lie in this Location, without those that are still being written."""
    return sum(not key.endswith(".partial") for key in shards.files())


def tree_digest(folder, *, without=()):
    """Return the SHA-256 of every file below a folder, by name."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.name not in without
    }  # fmt: skip
