"""Networks of other libraries brought into a program: modules by ``torch.export``, TorchScript by torch's converter."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.errors import ModelError
from pipeline.unet.foreign.pt2 import Exported, read_pt2
from pipeline.unet.foreign.recorder import recorded


def exported(network: nn.Module, shape: tuple[int, ...]) -> Exported:
    """Return a network, put in eval mode, as a program; of any size where it can be exported so.

    Parameters
    ----------
    shape : of an example, (1, channels, *spatial)

    Raises
    ------
    ModelError : torch.export cannot write it down.
    """
    network, x = network.eval(), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sizes = (dict.fromkeys(range(2, len(shape)), torch.export.Dim.AUTO),)
    for dynamic_shapes in (sizes, None):
        try:
            with _quiet():
                return _read(torch.export.export(network, (x,), dynamic_shapes=dynamic_shapes))
        except ModelError:
            raise
        except Exception as error:  # noqa: BLE001 exporters fail by whatever error they like
            cause = " ".join(str(error).split())[:200]
    raise ModelError(f"torch.export must be able to write the network down, got {cause}; export it by hand")


def exported_script(content: bytes, shape: tuple[int, ...]) -> Exported:
    """Return the network of a TorchScript archive as a program. The archive is code: give it only where it is trusted.

    Raises
    ------
    ModelError : torch no longer loads it, or cannot convert it.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        with _quiet():
            script = torch.jit.load(io.BytesIO(content), map_location="cpu").eval()  # type: ignore[no-untyped-call]
            try:
                return _read(_converted(script, x))
            except Exception:  # noqa: BLE001 what has loops and branches is written down for one size, as it ran
                return recorded(script, x)
    except RuntimeError as error:
        cause = " ".join(str(error).split())[:200]
        raise ModelError(
            f"TorchScript must be convertible by torch {torch.__version__}, got {cause}; use torch.export.save"
        ) from error


def _converted(script: Any, x: torch.Tensor) -> Any:  # noqa: ANN401 torch has no types for either
    # torch names this converter itself where torch.export is given TorchScript (2.13), but keeps it in a private place
    from torch._export.converter import TS2EPConverter

    return TS2EPConverter(script, (x,)).convert()


def _read(program: Any) -> Exported:  # noqa: ANN401
    content = io.BytesIO()
    torch.export.save(program, content)
    return read_pt2(content.getvalue())


@contextmanager
def _quiet() -> Iterator[None]:
    """Run torch's exporters without their warnings and notes on sizes."""
    was = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(was)
