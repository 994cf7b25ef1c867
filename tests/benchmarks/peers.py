"""How others run a network over a scan that is larger than one forward pass: one function per scheme.

Each function imports its library and loads the network, and returns what is then timed: from the image on disk to the
classes on disk. That returns logits of shape (1, classes, *spatial) where the scheme has them in memory, what else it
tells of the run, in a dictionary, or None.
All get the same image, the same intensity window and the same network module with the same weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import zarr
from torch import library as torch_library

from pipeline.store.image import open_image
from pipeline.store.location import Location
from pipeline.unet.model import build, load_model

_PATCH = {2: 256, 3: 96}  # MONAI has no default window: larger in 2-D than that of its examples, which costs it less
_EXAMPLES = 96  # along every axis, four windows at once, as MONAI's tutorials have it (unet_evaluation_array.py)
_CHUNK = {2: 512, 3: 64}  # the usual chunks, and Dask's blocks
_BLOCK = {2: 512, 3: 128}  # the most for torch-em's: of a size that the halo does not dwarf


@dataclass(frozen=True, slots=True)
class Job:
    """One run on a device, "cpu" or "cuda": ``folder`` holds the case's image and model, and gets the classes."""

    folder: Path
    dims: int
    device: str = "cpu"

    @property
    def image(self) -> str:
        return str(self.folder / "scan.zarr")

    @property
    def model(self) -> str:
        return str(self.folder / "model.safetensors")

    @property
    def classes(self) -> str:
        return str(self.folder / "classes.zarr")


@dataclass(frozen=True, slots=True)
class Scheme:
    """``prepare`` takes a Job and returns what is timed; ``is_slow`` if it computes most voxels four times or more.

    What says float32 is in cuDNN's TF32 on a GPU, where torch is left as it comes, but ours.
    """

    prepare: Callable[[Job], Callable[[], torch.Tensor | dict[str, float] | None]]
    engine: str = "eager"
    precision: str = "float32"
    is_slow: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


def load(job):
    """Return the model, and its network in torch's usual memory format, as those who use these libraries have it."""
    model = load_model(job.model)
    return model, build(model, job.device).to(memory_format=torch.contiguous_format)


def open_scan(job, model):
    """Return the image's array, shape (channels, *spatial), and the function that normalises its voxels."""
    image = open_image(Location(job.image))
    offset, scale, _, _ = model.scaling.windows(image.statistics, dtype=image.dtype)[0]

    def normalised(voxels):
        scaled = np.asarray(voxels).astype(np.float32)
        scaled -= offset
        scaled *= scale
        return scaled

    return zarr.open_array(str(image.location / "0"), mode="r"), normalised


def create_classes(job, array):
    """Make the Zarr array of classes, in chunks of the usual size: with the default codecs, as its users do."""
    chunks = tuple(min(_CHUNK[job.dims], n) for n in array.shape[1:])
    return zarr.create_array(job.classes, shape=array.shape[1:], chunks=chunks, dtype=np.uint8)


def in_memory(job, infer):
    """Return what is timed of a scheme that takes the scan as one tensor (1, 1, *spatial) and returns its logits."""
    model, network = load(job)

    def run():
        array, normalised = open_scan(job, model)
        x = torch.from_numpy(normalised(array[...])[None]).to(job.device)
        with torch.inference_mode():
            logits = infer(network, x)
            classes = logits.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
        create_classes(job, array)[...] = classes
        return logits

    return run


def whole_scan(job):
    """One forward pass, zeros beyond the scan's border, where memory allows it."""
    return in_memory(job, lambda network, x: network(x))


def monai(job, *, size=None, n_batch=1, **options):
    from monai.inferers import sliding_window_inference

    patch = (size or _PATCH[job.dims],) * job.dims
    return in_memory(job, lambda network, x: sliding_window_inference(x, patch, n_batch, network, **options))


def monai_default(job):
    return monai(job)


def monai_examples(job):
    return monai(job, size=_EXAMPLES, n_batch=4)


def monai_channels_last(job):
    """MONAI's default on a network in the memory format that oneDNN likes, which its users must know of."""
    from monai.inferers import sliding_window_inference

    layout, patch = (torch.channels_last if job.dims == 2 else torch.channels_last_3d), (_PATCH[job.dims],) * job.dims

    def infer(network, x):
        network.to(memory_format=layout)
        return sliding_window_inference(x.contiguous(memory_format=layout), patch, 1, network)

    return in_memory(job, infer)


def monai_bf16(job):
    """MONAI's default in the precision that torch's autocast gives it."""
    from monai.inferers import sliding_window_inference

    patch = (_PATCH[job.dims],) * job.dims

    def infer(network, x):
        with torch.autocast(job.device, torch.bfloat16):
            return sliding_window_inference(x, patch, 1, network)

    return in_memory(job, infer)


def monai_gaussian(job):
    return monai(job, overlap=0.5, mode="gaussian")


def nnunet(job):
    """The predictor as ``nnUNetv2_predict --disable_tta`` has it; it adds logits up in float16, whatever the network.

    It takes (channels, z, y, x) always; a network with a patch of two numbers gets the slices.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=0.5, use_gaussian=True, use_mirroring=False,
        perform_everything_on_device=job.device != "cpu", device=torch.device(job.device), allow_tqdm=False,
    )  # fmt: skip
    predictor.configuration_manager = SimpleNamespace(patch_size=(_PATCH[job.dims],) * job.dims)

    def infer(network, x):
        predictor.network = network
        predictor.label_manager = SimpleNamespace(num_segmentation_heads=network.settings.n_classes)
        logits = predictor.predict_sliding_window_return_logits(x[0, :, None] if job.dims == 2 else x[0])
        return logits[None, :, 0] if job.dims == 2 else logits[None]

    return in_memory(job, infer)


def dask_overlap(job):
    """Blocks with our halo, block after block: the threads are the network's.

    Dask's ``reflect`` repeats the edge voxel, unlike numpy's and ours; nothing that Dask has is nearer. Away from the
    border, blocks with this depth are exact where chunks start on multiples of the stride.
    """
    import dask
    import dask.array as da

    model, network = load(job)
    depth = (0, *model.rule.halo)

    def run():
        array, normalised = open_scan(job, model)

        def classes_of(voxels):
            with torch.inference_mode():
                logits = network(torch.from_numpy(normalised(voxels))[None].to(job.device))[0]
                return logits.argmax(dim=0, keepdim=True).byte().cpu().numpy()

        scan = da.from_zarr(array, chunks=(1, *(_CHUNK[job.dims],) * job.dims))
        classes = da.map_overlap(
            classes_of, scan, depth=depth, boundary=("none", *("reflect",) * job.dims), dtype=np.uint8,
            meta=np.empty((0,) * scan.ndim, np.uint8),
        )  # fmt: skip
        with dask.config.set(scheduler="synchronous"):
            da.store(classes[0], create_classes(job, array), lock=False)

    return run


def torch_em(job):
    """Blocks with our halo from Zarr to Zarr; blocks at the border are mirrored as we do."""
    predict = _predict_with_halo()
    model, network = load(job)

    def run():
        array, normalised = open_scan(job, model)
        # the fewest blocks of at most this size, all alike: torch-em computes whole blocks even where the scan ends
        block = tuple(-(-n // -(-n // _BLOCK[job.dims])) for n in array.shape[1:])
        predict(
            array, network, ["cpu" if job.device == "cpu" else 0], block, model.rule.halo, create_classes(job, array),
            preprocess=normalised, postprocess=lambda logits: logits.argmax(axis=0).astype(np.uint8),
            with_channels=True, disable_tqdm=True,
        )  # fmt: skip

    return run


def _predict_with_halo() -> Any:
    """Import torch-em, which draws with torchvision in training: its wheels are for CUDA and fail beside a CPU torch.

    It imports all the same once the operators that it then cannot load have a name (torchvision 0.28.0).
    """
    if not torch.version.cuda:
        operators = torch_library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torch_em.util.prediction import predict_with_halo

    return predict_with_halo


PEERS = {
    "whole scan, bare": Scheme(whole_scan),
    "MONAI default": Scheme(monai_default),
    "MONAI default, its examples' window": Scheme(monai_examples),
    "MONAI default, channels last": Scheme(monai_channels_last),
    "MONAI default, bf16 autocast": Scheme(monai_bf16, precision="bf16"),
    "MONAI 0.5 Gaussian": Scheme(monai_gaussian, is_slow=True),
    "nnU-Net predictor": Scheme(nnunet, precision="float32, sums float16", is_slow=True),
    "dask map_overlap": Scheme(dask_overlap),
    "torch-em predict_with_halo": Scheme(torch_em),
}
