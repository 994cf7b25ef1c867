"""Expiry: until when the certificates hold by which a Dask scheduler or worker speaks TLS, as a Prometheus gauge.

To be preloaded by both (``scheduler.preload`` and ``worker.preload`` of Dask's configuration). A process goes on with
the certificates that it read when it started, whatever lies in their files since: so does the gauge.
"""

# distributed is typed in parts only
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from distributed import Scheduler, Worker
from prometheus_client import Gauge

_EXPIRY = Gauge("haloseg_certificate_expiry_seconds", "When a certificate expires, since 1970", ["certificate"])


def dask_setup(node: Scheduler | Worker) -> None:
    """Show when the certificates of a scheduler or worker expire; Dask calls this as it starts."""
    files = node.security.get_tls_config_for_role("scheduler" if isinstance(node, Scheduler) else "worker")
    for certificate, key in (("own", "cert"), ("authority", "ca_file")):
        if files[key]:
            _EXPIRY.labels(certificate).set(expiry_s(files[key]))


def expiry_s(pem: str) -> float:
    """Return when the first of some certificates expires, in seconds since 1970.

    Parameters
    ----------
    pem : path of their file, or what would be in it, which has many lines
    """
    told = pem.encode() if "\n" in pem else Path(pem).read_bytes()
    return min(each.not_valid_after_utc.timestamp() for each in x509.load_pem_x509_certificates(told))
