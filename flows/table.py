"""The archive's table in the Prefect UI: each scan, what has become of it, and why."""

from __future__ import annotations

from contextvars import copy_context
from dataclasses import dataclass
from threading import Lock, Timer
from time import monotonic
from typing import cast
from uuid import UUID

from prefect.artifacts import create_markdown_artifact

from flows.reports import archive_markdown, plain
from flows.showing import rewrite, shown, slug
from flows.watching import SECONDS_BETWEEN_UPDATES, duration
from pipeline.archive import Archive, Scan, Survey
from pipeline.console import quantity
from pipeline.store.location import Location

_SHOWN = 500
_SECONDS_PER_ROW = 0.1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one scan in this run; ``cause`` says why it failed or waits."""

    scan: Scan
    state: str
    cause: str = ""
    seconds: float = 0.0
    voxels_per_s: float = 0.0
    run_id: str = ""


class Table:
    """The archive's table under a stable key, kept up to date while the flow runs."""

    def __init__(self, archive: Archive, found: Survey) -> None:
        self._archive, self._begin_s, self.found = archive, monotonic(), found
        self._lock, self._artifact = Lock(), cast("UUID | None", None)
        self._later: Timer | None = None
        self.outcomes = {scan.path: Outcome(scan, str(scan.state), scan.detail) for scan in found.scans}

    def put(self, outcome: Outcome) -> None:
        """Take what became of a scan, and show it within two seconds; of long tables, which are events too, later."""
        with self._lock:
            self.outcomes[outcome.scan.path] = outcome
            if self._later is None:
                pause_s = min(60.0, max(SECONDS_BETWEEN_UPDATES, _SECONDS_PER_ROW * len(self.outcomes)))
                self._later = Timer(pause_s, copy_context().run, (self._write_later,))
                self._later.daemon = True
                self._later.start()

    def write(self) -> None:
        """Show the table as it is now: one version of the artifact in each run."""
        with self._lock:
            if self._later is not None:
                self._later.cancel()
                self._later = None
            self._write()

    def _write_later(self) -> None:
        with self._lock:
            if self._later is not None:
                self._later = None
                self._write()

    def _write(self) -> None:
        text, told = self._page(), f"{self._archive.root}: {self.summary}"
        if self._artifact is None:
            key = f"archive-{slug(self._archive.root)}-{slug(self._archive.name)}"
            made = shown(lambda: create_markdown_artifact(text, key=key, description=told))
            self._artifact = made if isinstance(made, UUID) else None
            return
        rewrite(self._artifact, data=text, description=told)

    @property
    def summary(self) -> str:
        """How many scans are in each state."""
        counts: dict[str, int] = {}
        for each in self.outcomes.values():
            counts[each.state] = counts.get(each.state, 0) + 1
        told = ", ".join(f"{n:,} {state}" for state, n in sorted(counts.items(), key=lambda each: (-each[1], each[0])))
        return f"{len(self.outcomes):,} scans: {told or 'none'}; {duration(monotonic() - self._begin_s)}"

    def _page(self) -> str:
        """Return the table: those first that need a look, then those of this run; of very many the first."""
        rank = {"failed": 0, "blocked": 1, "running": 2, "published": 3}
        ordered = sorted(self.outcomes.values(), key=lambda each: (rank.get(each.state, 4), each.scan.relative))
        rows = [self._row(each) for each in ordered[:_SHOWN]]
        if len(ordered) > _SHOWN:
            rows.append((f"and {len(ordered) - _SHOWN:,} more", *[""] * 5))
        causes = [(each.scan.relative, each.cause) for each in ordered[:_SHOWN] if each.cause]
        return archive_markdown(rows, causes=causes, summary=self.summary)

    def _row(self, each: Outcome) -> tuple[str, ...]:
        made = Location(each.scan.image) / self.found.folder / self._archive.name
        beside = str(made).removeprefix(f"{Location(self._archive.root).absolute()}/")
        return (
            plain(each.scan.relative),
            f"[{each.state}](/runs/flow-run/{each.run_id})" if each.run_id else each.state,
            f"{each.scan.n_voxels:,}" if each.scan.n_voxels else "",
            duration(each.seconds) if each.seconds else "",
            quantity(each.voxels_per_s) if each.voxels_per_s else "",
            plain(beside) if each.state in ("done", "published") else "",
        )  # fmt: skip
