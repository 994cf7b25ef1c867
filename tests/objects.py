"""A real server that speaks S3 (moto), in a process of its own on the loopback device, for the tests that need one."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen
from uuid import uuid4

import fsspec

KEY, SECRET = "AKIAHALOSEGTEST", "secret-of-the-tests"


@contextmanager
def object_server(folder: Path):
    """Yield the address of a server that keeps its buckets in memory; the system chooses the port."""
    log = folder / "moto.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=out)
    try:
        while not (found := re.search(r"Running on (http://[\d.:]+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield found[1]
    finally:
        process.kill()
        process.wait(30)


def environment(address: str) -> dict[str, str]:
    """Return what a user sets to have haloseg use a server instead of Amazon's."""
    return {
        "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip


def new_bucket(address: str) -> str:
    """Make a bucket and return its URL."""
    name = f"haloseg-{uuid4().hex[:12]}"
    ask(f"{address}/{name}", b"", method="PUT")
    return f"s3://{name}"


def ask(url: str, content: bytes, *, method: str) -> None:
    with urlopen(Request(url, data=content, method=method, headers={"Content-Type": "text/plain"})) as answer:
        answer.read()


def upload(folder: Path, url: str) -> str:
    """Copy a folder to a prefix, as an instrument's computer would, and return the prefix."""
    fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
    fs.put(f"{folder}/", f"{path}/", recursive=True)
    return url


def digests(url: str) -> dict[str, str]:
    """Return the SHA-256 of every file below a prefix or folder, by its name from there; there are at least two."""
    fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
    found = fs.cat(fs.find(path))
    return {name.removeprefix(path): hashlib.sha256(content).hexdigest() for name, content in found.items()}
