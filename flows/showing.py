"""Showing: what flows put into the Prefect UI; a server that does not answer costs the picture alone."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from typing import TypeVar
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from pipeline.store.location import Location

_LONGEST_KEY = 80

T = TypeVar("T")


def slug(text: str) -> str:
    """Return a text as part of an artifact's key: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[-_LONGEST_KEY:].strip("-") or "scan"


def key_of(image: str, *parts: str) -> str:
    """Return the key of an artifact about an image: its name, a mark of its path, since names come twice, and parts."""
    mark = hashlib.sha256(image.encode()).hexdigest()[:6]
    return "-".join((slug(Location(image).name), mark, *map(slug, parts)))


def shown(act: Callable[[], T]) -> T | None:
    """Return what an act that only shows something returns; a server that does not answer costs the picture alone."""
    try:
        return act()
    except Exception as error:  # noqa: BLE001 whatever it is, it is no reason to lose labels
        logging.getLogger("haloseg").debug("not shown in the UI: %s", error)
        return None


def rewrite(artifact: UUID, *, data: str, description: str) -> None:
    """Put new text into an artifact, instead of a new version of it."""

    def act() -> None:
        with get_client(sync_client=True) as client:
            client.update_artifact(artifact, ArtifactUpdate(data=data, description=description))

    shown(act)
