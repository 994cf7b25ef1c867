"""What people see on a terminal: progress on stderr, tables on stdout, errors in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.compute.runner import BlockRecord

STDERR = Console(stderr=True)


class Bars:
    """A progress bar per stage with blocks, voxels per second and time left; see Watcher."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bar: TaskID | None = None
        self._begin, self._n_voxels = 0.0, 0

    def begin(self, stage: str, *, n_blocks: int, n_done: int) -> None:
        """Show a new bar."""
        self._begin, self._n_voxels = perf_counter(), 0
        self._bar = self._progress.add_task(stage, total=n_blocks, completed=n_done, speed="")

    def advance(self, record: BlockRecord) -> None:
        """Move the bar of the current stage."""
        if self._bar is None:
            return
        self._n_voxels += record.n_voxels
        rate = self._n_voxels / max(perf_counter() - self._begin, 1e-9)
        self._progress.update(self._bar, advance=record.n_blocks, speed=f"{quantity(rate)} voxels/s")


@contextmanager
def bars(*, shown: bool) -> Iterator[Bars]:
    """Show progress bars on stderr while the block runs."""
    columns = (
        TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TextColumn("blocks"),
        TextColumn("{task.fields[speed]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=STDERR, disable=not shown) as progress:
        yield Bars(progress)


def quantity(number: float) -> str:
    """Return a number with three digits and k, M, G or T."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def n_bytes(number: float) -> str:
    """Return bytes as KiB, MiB, GiB or TiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"


def show(document: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one result on stdout: as a JSON document, or as a table; nested tables come below."""
    if as_json:
        sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    plain = Table(show_header=False, box=None, pad_edge=False)
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            continue
        plain.add_row(titled(key), Text(readable(key, value)))
    console.print(plain)
    for value in document.values():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            console.print(_rows(value))


def titled(key: str) -> str:
    """Return a key as people read it; the unit of bytes and lengths stands with the value."""
    return key.removesuffix("_bytes").removesuffix("_shape").replace("_", " ")


def readable(key: str, value: Any) -> str:  # noqa: ANN401 whatever JSON holds
    """Return a value as people read it, with its unit by the key's ending; --json has what is nested deeper."""
    if value is None:
        return "-"
    if isinstance(value, int) and "bytes" in key:
        return n_bytes(value)
    if isinstance(value, float):  # 65535 as it is, not 6.554e+04
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        extent = key.endswith(("shape", "size_um", "chunk", "shard"))
        inner = "shape" if value and isinstance(value[0], list) else ""
        return (" x " if extent else ", ").join(readable(inner, v) for v in value) or "-"
    if isinstance(value, Mapping):
        plain = {k: v for k, v in value.items() if not isinstance(v, list | Mapping)}
        return ", ".join(f"{titled(k)} {readable(k, v)}" for k, v in (plain or value).items())
    return str(value)


def _rows(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for key in rows[0]:
        table.add_column(titled(key))
    for row in rows:
        table.add_row(*(Text(readable(key, value)) for key, value in row.items()))
    return table
