"""What the tests of deploy/ read, and how."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent


def tool(name: str) -> str | None:
    """Return the path of a program beside Python or on the PATH; None where there is none."""
    return shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")


def load(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


def load_json(path: str) -> Any:
    return json.loads((DEPLOY / path).read_text())


def files(*endings: str) -> list[Path]:
    """Return the files of deploy/ that git would take."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "deploy"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return [ROOT / name for name in listed if name.endswith(endings or ("",)) and (ROOT / name).exists()]


def make_certificates(folder: Path, *hosts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [DEPLOY / "make-certificates.sh", folder, *hosts]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def tls_environment(folder: Path) -> dict[str, str]:
    """Return Dask's settings of the Kubernetes pods, with the certificates of a folder."""
    lines = (DEPLOY / "kubernetes/base/settings.env").read_text().splitlines()
    kept = dict(line.split("=", 1) for line in lines if line.startswith("DASK_"))
    return {name: value.replace("/etc/haloseg/tls", str(folder)) for name, value in kept.items()}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(holds: Callable[[], Any], *, what: str, seconds: float = 600) -> Any:
    """Return what ``holds`` returns as soon as that is true."""
    end = time.monotonic() + seconds
    while not (got := holds()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return got


def strings(document: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in a document with the path to it."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield from strings(value, f"{path}/{key}")
    elif isinstance(document, list):
        for index, value in enumerate(document):
            yield from strings(value, f"{path}/{index}")
    elif isinstance(document, str):
        yield path, document


def substituted(document: Any, values: dict[str, Any]) -> Any:
    """Return a document with each {{ name }} replaced, as Prefect does: a whole text takes the value's type."""
    if isinstance(document, dict):
        return {key: substituted(value, values) for key, value in document.items()}
    if isinstance(document, list):
        return [substituted(value, values) for value in document]
    if not isinstance(document, str):
        return document
    whole = re.fullmatch(r"\{\{ *(\w+) *\}\}", document)
    if whole:
        return values[whole[1]]
    return re.sub(r"\{\{ *(\w+) *\}\}", lambda found: str(values[found[1]]), document)
