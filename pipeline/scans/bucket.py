"""Bucket: an S3 bucket is asked once in each process, with little patience, before it is used in earnest.

s3fs and botocore try again for minutes what may pass. That is right in the middle of a run, and wrong at its start,
where a mistyped bucket, missing credentials and a server that is down are to be told at once, each by its own line.
"""

from __future__ import annotations

import re
from typing import Any

from fsspec.config import conf
from fsspec.core import url_to_fs

from pipeline.errors import StorageError, StoreError

_S3 = ("s3://", "s3a://")
_PATIENCE = {"connect_timeout": 4, "read_timeout": 4, "retries": {"total_max_attempts": 2}}  # so 8 s at most
_NO_SUCH = {"FileNotFoundError", "ParamValidationError"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
_PASSWORD = re.compile(r"(?<=//)[^/@\s]*@")
_ANSWERED = set[str]()


def is_bucket(url: str) -> bool:
    """Whether a URL is of an S3 bucket, or of something in one."""
    return url.startswith(_S3)


def knock(url: str) -> None:
    """Ask the bucket of a URL for a name that begins as the URL does, unless it has answered this process before.

    Any other URL is let pass.

    Raises
    ------
    StoreError : there is no such bucket, or this process is not let in.
    StorageError : nobody answers.
    """
    if not is_bucket(url):
        return
    root = "/".join(url.split("/", 3)[:3])
    if root in _ANSWERED:
        return
    fs = _impatient(url)
    bucket, key, _ = fs.split_path(url)
    try:
        fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
    except Exception as error:
        if type(error).__name__ in _NO_SUCH:
            raise StoreError(f"a bucket must exist, got {bucket!r} {_at(fs)}; mend its name, or make it") from error
        if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
            raise StoreError(
                f"bucket {bucket} must let us in, got {told(error)} {_at(fs)}; mend the credentials, such as "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials, or the bucket's policy"
            ) from error
        raise StorageError(
            f"an object store must answer, got {told(error)} {_at(fs)}; mend AWS_ENDPOINT_URL or the network, and run "
            "the same command again"
        ) from error
    _ANSWERED.add(root)


def told(error: BaseException) -> str:
    """Return an error as one line, without the password of a URL."""
    return without_password(f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip("."))


def without_password(text: str) -> str:
    """Return a text whose URLs have lost what stands before their @."""
    return _PASSWORD.sub("", text)


def _impatient(url: str) -> Any:  # noqa: ANN401 an S3FileSystem, where s3fs is installed
    """Return a file system that gives up soon; whatever else is configured for S3 holds for it too."""
    settings = conf.get("s3", {}).get("config_kwargs", {}) | _PATIENCE
    fs, _ = url_to_fs(url, config_kwargs=settings, use_listings_cache=False, skip_instance_cache=True)
    fs.retries = 1
    return fs


def _at(fs: Any) -> str:  # noqa: ANN401
    """Return where a file system looks for the bucket."""
    client = fs._s3  # None where not even that could be made
    return f"at {without_password(client.meta.endpoint_url)}" if client else "on S3"
