"""How fast a network streams on this machine: a few slabs of noise, timed."""

from __future__ import annotations

from time import perf_counter

import torch

from pipeline.unet.engine import Engine
from pipeline.unet.engines import keep_freed_memory
from pipeline.unet.numbers import exactly
from pipeline.unet.streaming import Stream


def rows_per_s(*engines: Engine, cross: tuple[int, ...], slab: int, seconds: float) -> float:
    """Return the rows per second of a stream with this cross-section, once it is under way.

    Parameters
    ----------
    engines : which run side by side on the same voxels
    cross : voxels of the core along the axes that are not streamed
    seconds : how long to measure, at least two slabs
    """
    keep_freed_memory()
    engine = engines[0]
    stream = Stream(*engines, cross=tuple((0, n) for n in cross), slab=slab)
    across = [stop - start for start, stop in stream.cross]
    x = torch.randn((1, engine.settings.in_channels, slab, *across), device=engine.device)
    x = x.to(engine.dtype).contiguous(memory_format=engine.memory_format)
    begin, n_rows, n_slabs = 0.0, 0, 0
    with torch.inference_mode(), exactly(tf32=engine.tf32):
        for _, logits in stream.run(0, 2**40, lambda low, high: x.narrow(2, 0, high - low)):
            float(logits.flatten()[0])  # waits for the device
            n_slabs += 1
            if n_slabs == 2:
                begin = perf_counter()
            elif n_slabs > 2:
                n_rows += logits.shape[2]
                if n_slabs > 3 and perf_counter() - begin > seconds:
                    break
    return n_rows / (perf_counter() - begin)
