"""Plan: what segmenting an image with a model will do, all checked beforehand; nothing is written."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from pipeline.config import EngineName, Passes, Precision, Scheme, Tta
from pipeline.errors import ArgumentError, BudgetError, ModelError
from pipeline.geometry.grid import BlockGrid
from pipeline.geometry.tiles import TileRule
from pipeline.provenance import result_of
from pipeline.store.arrays import done_shards
from pipeline.store.image import Image, open_image
from pipeline.store.labels import Labels, same_layout
from pipeline.store.location import Location
from pipeline.store.probabilities import Probabilities, check_same_probabilities
from pipeline.store.results import Result, check_same_result
from pipeline.unet.columns import Columns, Streaming
from pipeline.unet.cost import bare_multiply_adds, tile_multiply_adds, weight_bytes
from pipeline.unet.families import chain_of, why_not_streamed
from pipeline.unet.foreign.network import ForeignSettings, scheme_for
from pipeline.unet.memory import choose_tile, other_networks_bytes, peak_bytes
from pipeline.unet.model import Model, load_model
from pipeline.unet.settings import Head, UNetSettings
from pipeline.unet.turns import check_turns
from pipeline.voxel_size import check_rotations, warn_of_voxel_size
from pipeline.works.blocks import Outputs, SegmentBlocks
from pipeline.works.columns import SegmentColumns

log = logging.getLogger("haloseg")

USUAL = Scheme()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, all checked, nothing written yet.

    Attributes
    ----------
    result : the volume that is made: labels, or what a network without classes predicts
    rule : the network's rule over the image's spatial axes
    grid : one block per shard of the label volume
    columns : how the scan is streamed; None where it is run by overlapping tiles
    tile_shape : of overlapping tiles, what enters the network at once, along the image's spatial axes; slices first
        for a 2-D network, without their neighbours; empty where the scan is streamed
    n_units : columns, or tiles
    peak_bytes : activations, weights and buffers of one worker, without the interpreter and its libraries
    multiply_adds : multiplications of the whole run
    halo_tax : those, in units of one pass over the scan, or as many as are averaged, without any halo
    bytes_read : uncompressed, halos counted each time they are read
    n_workers : among which it is shared out
    """

    image: Image
    model: Model
    model_path: str
    result: Result
    probabilities: Probabilities | None
    rule: TileRule
    grid: BlockGrid
    columns: Columns | None
    tile_shape: tuple[int, ...]
    device: str
    engine: EngineName
    precision: Precision
    tta: Tta
    n_units: int
    peak_bytes: int
    budget_bytes: int
    multiply_adds: int
    halo_tax: float
    bytes_read: int
    bytes_written: int
    n_workers: int

    @property
    def labels(self) -> Labels:
        """The result of a network that has classes."""
        assert isinstance(self.result, Labels)
        return self.result

    @property
    def passes(self) -> Passes:
        """What is averaged: networks, and the ways in which they see the scan."""
        return self.model.passes(self.tta)

    def done(self) -> set[int]:
        """Return the blocks whose every output exists, as the stores say now."""
        done = done_shards(self.result.location / "0", self.grid)
        likely = self.probabilities
        return done & done_shards(likely.location / "0", self.grid) if likely else done

    def work(self, *, blocks: tuple[int, ...] | None = None) -> SegmentColumns | SegmentBlocks:
        """Return the work of the run; ``blocks`` are shards of a column along each axis, other than planned."""
        has_classes, likely = isinstance(self.result, Labels), self.probabilities
        result, probabilities = self.result.location / "0", likely.location / "0" if likely else None
        outputs = Outputs(
            self.image.location, self.model_path, self.model.digest, result if has_classes else None,
            probabilities if has_classes else result, self.grid, self.device, self.engine, self.precision, self.tta,
        )  # fmt: skip
        if self.columns is None:
            return SegmentBlocks(outputs, self.tile_shape)
        return SegmentColumns(outputs, replace(self.columns, blocks=blocks) if blocks else self.columns)


def plan_segment(
    image: str, *, model: str, name: str, probabilities: bool = False, scheme: Scheme = USUAL
) -> Plan:
    """Check everything that can be checked before a run, and say what the run will do; nothing is written.

    Parameters
    ----------
    image : path or URL of a complete image
    model : path of a model file

    Raises
    ------
    InputError : image, model and settings do not fit; the message says the remedy.
    """
    # absolute, since the workers of a cluster run in folders of their own
    of, model = open_image(Location(str(image)).absolute()), str(Location(str(model)).absolute())
    network = load_model(model)
    scheme = scheme_for(network.settings, scheme)
    check_fit(network, n_spatial=len(of.spatial_shape), n_channels=of.n_channels, path=model)
    network.windows(of)  # refuses an image that it does not fit
    warn_of_voxel_size(of, network)
    check_turns(network.settings, scheme.tta)
    check_rotations(of, scheme.tta)
    slices = len(of.spatial_shape) - network.settings.dims
    rule = network.rule.over_slices(network.settings.neighbours) if slices else network.rule
    layout = same_layout(of, rule.stride)
    grid = BlockGrid(of.spatial_shape, layout.shard, rule.halo, rule.stride)
    result = result_of(of, network, model, name=name, layout=layout, scheme=scheme)
    check_same_result(result)
    likely = _probabilities(result, of, n_outputs=network.settings.n_classes) if probabilities else None
    output_bytes = _output_bytes(network, probabilities=probabilities)
    why = why_not_streamed(network.settings)
    if why and scheme.streamed:
        raise ArgumentError(f"a streamed network must be one of ours, got {why}; leave --slab and --column out")
    bare = bare_multiply_adds(network.settings, of.spatial_shape, passes=network.passes(scheme.tta))
    scheme = replace(scheme, n_workers=scheme.shared(bare))
    how = _tiled if scheme.tiled or why else _streamed
    columns, tile_shape, n_units, peak, multiply_adds, read = how(of, network, grid, scheme, output_bytes)
    return Plan(
        of, network, model, result, likely, rule, grid, columns, tile_shape, scheme.device, scheme.taken,
        scheme.precision, scheme.tta, n_units, peak, scheme.bound_bytes, multiply_adds,
        multiply_adds / bare, read * of.n_channels * of.array.dtype.itemsize, prod(grid.shape) * output_bytes,
        scheme.n_workers,
    )  # fmt: skip


_Counted = tuple[Columns | None, tuple[int, ...], int, int, int, int]


def _streamed(image: Image, model: Model, grid: BlockGrid, scheme: Scheme, output_bytes: int) -> _Counted:
    """Return the columns, how many there are, bytes of a worker, multiplications, and voxels read."""
    streaming = streaming_of(
        image, model, grid, output_bytes, precision=scheme.precision, tta=scheme.tta, device=scheme.device
    )
    columns, cost = streaming.choose(
        budget_bytes=scheme.bound_bytes, n_workers=scheme.n_workers, slab=scheme.slab, blocks=scheme.column
    )
    return columns, (), cost.n_columns, cost.peak_bytes, cost.multiply_adds, streaming.voxels_read(columns)


def streaming_of(
    image: Image, model: Model, grid: BlockGrid, output_bytes: int, *, precision: Precision, tta: Tta, device: str
) -> Streaming:
    """Return what columns are chosen for."""
    return Streaming(
        model.unet, grid, image.layout.chunk, image.n_channels * image.array.dtype.itemsize, output_bytes,
        precision.itemsize, device, model.passes(tta),
    )  # fmt: skip


def _tiled(image: Image, model: Model, grid: BlockGrid, scheme: Scheme, output_bytes: int) -> _Counted:
    """Return the tile, how many there are, bytes of a worker, multiplications, and voxels read."""
    slices = len(grid.shape) - model.settings.dims
    passes = model.passes(scheme.tta)
    buffers = _buffer_bytes(grid, image, output_bytes)
    if scheme.taken is EngineName.REFERENCE:
        buffers += other_networks_bytes(model)
    elif passes.n > 1:
        buffers += weight_bytes(chain_of(model.unet), itemsize=scheme.precision.itemsize, passes=passes)
    tile = _tile(
        model, grid, slices=slices, tile=scheme.tile, budget_bytes=scheme.bound_bytes - buffers, tta=scheme.tta
    )
    activations = peak_bytes(model.settings, tile[slices:], n_slices=prod(tile[:slices]), passes=passes)
    core = (*tile[:slices], *model.rule.core_shape(tile[slices:]))
    n_tiles, multiply_adds, read = _counts(grid, core, model.settings)
    return None, tile, n_tiles, buffers + activations, passes.n * multiply_adds, read


def _output_bytes(model: Model, *, probabilities: bool) -> int:
    """Return the bytes of a voxel's class, and of its probabilities or values."""
    linear = model.settings.head is Head.LINEAR
    return (0 if linear else 1) + (4 * model.settings.n_classes if linear or probabilities else 0)


def _probabilities(result: Result, image: Image, *, n_outputs: int) -> Probabilities:
    if not isinstance(result, Labels):
        raise ArgumentError("probabilities need a network with classes, got a linear head; leave --probabilities out")
    location = image.location / "probabilities" / result.location.name
    overlap = len(result.classes) > n_outputs  # one more than a sigmoid's channels, for none
    planned = Probabilities(location, result.layout, result.classes[-n_outputs:], overlap, result.fingerprint)
    check_same_probabilities(planned)
    return planned


def check_fit(model: Model, *, n_spatial: int, n_channels: int, path: str) -> None:
    """Refuse a model that takes other dimensions or channels than the scan has."""
    beside = model.settings.neighbours
    if model.settings.dims + (beside > 0) > n_spatial:
        seen, without = (f" that sees {beside} slices on each side", " without neighbours") if beside else ("", "")
        raise ModelError(
            f"a {model.settings.dims}-D network{seen} needs a volume, got a scan with {n_spatial} spatial axes for "
            f"{path}; use a 2-D model{without}"
        )
    if model.settings.image_channels != n_channels:
        raise ModelError(
            f"the scan must have the network's {model.settings.image_channels} channels, got {n_channels} for {path}; "
            "use a model trained on such scans"
        )


def _tile(
    model: Model, grid: BlockGrid, *, slices: int, tile: tuple[int, ...] | None, budget_bytes: int, tta: Tta
) -> tuple[int, ...]:
    """Return the tile along the image's spatial axes; of a volume a 2-D network takes as many slices as fit at once."""
    if tile is None:
        shape = choose_tile(model, budget_bytes=budget_bytes, largest_core=grid.core_shape[slices:], tta=tta)
    else:
        shape = _within_block(model, given_tile(model, tile), grid.core_shape[slices:])
        if (needed := peak_bytes(model.settings, shape, passes=model.passes(tta))) > budget_bytes:
            raise BudgetError(
                f"the tile must fit the budget, got {needed:,} bytes for tile {shape} where {max(0, budget_bytes):,} "
                "are left; use a smaller tile or raise --budget"
            )
    if not slices:
        return shape
    n = 1
    while 2 * n <= grid.core_shape[0] and (
        peak_bytes(model.settings, shape, n_slices=2 * n, passes=model.passes(tta)) <= budget_bytes
    ):
        n *= 2
    return (n, *shape)


def _within_block(model: Model, tile: tuple[int, ...], core_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the tile, cut to the block's core where it is larger, and say so."""
    core = model.rule.core_shape(tile)
    cut = model.rule.tile_shape(tuple(min(a, b) for a, b in zip(core, core_shape, strict=True)))
    if cut != tile:
        log.warning("the tile %s is larger than a block with its halo: it is cut to %s", tile, cut)
    return cut


def given_tile(model: Model, tile: tuple[int, ...]) -> tuple[int, ...]:
    """Return a tile's shape along the network's axes, one number standing for all; refuse one that it does not take."""
    every = tile * model.settings.dims if len(tile) == 1 else tile
    if len(every) != model.settings.dims:
        raise ArgumentError(f"tile needs {model.settings.dims} numbers or one for all, got {tile}; give one per axis")
    model.rule.core_shape(every)
    return every


def _buffer_bytes(grid: BlockGrid, image: Image, output_bytes: int) -> int:
    """Return the bytes of a block's tile as read and mirrored, of its output, and of their encoding."""
    block = prod(c + 2 * h for c, h in zip(grid.core_shape, grid.halo, strict=True))
    read = 2 * block * image.n_channels * image.array.dtype.itemsize
    return read + 3 * prod(grid.core_shape) * output_bytes


def _counts(
    grid: BlockGrid, core: tuple[int, ...], settings: UNetSettings | ForeignSettings
) -> tuple[int, int, int]:
    """Return tiles, their multiplications, and voxels read, over all blocks; tiles differ in size at borders only."""
    read = 1
    axes: list[Counter[int]] = []
    for n, c, h, s, t in zip(grid.shape, grid.core_shape, grid.halo, grid.align, core, strict=True):
        axis, one = BlockGrid((n,), (c,), (h,), (s,)), TileRule((s,), (h,), (0,))
        sizes = Counter(one.tile_shape(part.shape)[0] for block in axis for part in one.cores(block.core.shape, (t,)))
        axes.append(sizes)
        read *= sum(block.tile.clip((n,)).n_voxels for block in axis)
    slices = len(grid.shape) - settings.dims
    multiply_adds = prod(grid.shape[:slices]) * sum(
        prod(n for _, n in kinds) * tile_multiply_adds(settings, tuple(size for size, _ in kinds))
        for kinds in product(*(sizes.items() for sizes in axes[slices:]))
    )
    return prod(sizes.total() for sizes in axes), multiply_adds, read
