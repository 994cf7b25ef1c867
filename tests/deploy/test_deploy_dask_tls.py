"""The certificates of make-certificates.sh, with a real scheduler, worker and client set up as the pods are."""

import gc
import json
import os
import socket
import ssl
import subprocess
import sys
import traceback
import urllib.request

import pytest
import yaml
from clusters import children
from deploy_files import DEPLOY, free_port, load, make_certificates, tls_environment, until
from distributed import Client, Security
from queries import ASKED, samples

N_THREADS = "3"  # what Kubernetes would fill in for requests.cpu


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls") / "certificates"
    done = make_certificates(folder, "dask-scheduler", "10.0.0.4", "fe80::1")
    assert done.returncode == 0, done.stderr
    return folder


def security(folder):
    names = {"cert": f"{folder}/dask.pem", "key": f"{folder}/dask-key.pem"}
    return Security(
        tls_ca_file=f"{folder}/ca.pem", require_encryption=True, tls_client_cert=names["cert"],
        tls_client_key=names["key"],
    )  # fmt: skip


def openssl(*words):
    return subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=True).stdout


def test_a_certificate_is_the_authoritys_for_both_ends_and_secret(certificates):
    names = sorted(path.name for path in certificates.iterdir())
    assert names == ["ca-key.pem", "ca.pem", "dask-key.pem", "dask.pem"]
    assert {path.stat().st_mode & 0o777 for path in certificates.iterdir()} == {0o600}
    assert "OK" in openssl("verify", "-x509_strict", "-CAfile", certificates / "ca.pem", certificates / "dask.pem")
    told = openssl("x509", "-in", certificates / "dask.pem", "-noout", "-text")
    assert "TLS Web Server Authentication, TLS Web Client Authentication" in told
    assert "DNS:localhost, IP Address:127.0.0.1, DNS:dask-scheduler, IP Address:10.0.0.4, IP Address:FE80" in told
    assert "CA:FALSE" in told


def test_another_call_renews_the_certificate_under_the_same_authority(certificates, tmp_path):
    first = make_certificates(tmp_path / "new")
    before = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}
    again = make_certificates(tmp_path / "new", DAYS="30")
    after = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}
    assert (first.returncode, again.returncode) == (0, 0)
    assert "valid for 30 days" in again.stdout
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"dask.pem", "dask-key.pem"}
    assert "OK" in openssl("verify", "-CAfile", tmp_path / "new/ca.pem", tmp_path / "new/dask.pem")


def test_what_cannot_be_is_refused_in_one_line(tmp_path):
    assert make_certificates(tmp_path / "a").returncode == 0
    (tmp_path / "a/ca-key.pem").unlink()
    lost = make_certificates(tmp_path / "a")
    assert (lost.returncode, lost.stderr.count("\n")) == (2, 1)
    assert "fetch ca-key.pem" in lost.stderr
    nothing = subprocess.run([DEPLOY / "make-certificates.sh"], capture_output=True, text=True, check=False)
    assert (nothing.returncode, "a folder must be given" in nothing.stderr) == (2, True)


@pytest.fixture(scope="module")
def cluster(certificates, tmp_path_factory):
    """Run a scheduler and a worker with the commands and settings of the Kubernetes pods, on loopback."""
    folder = tmp_path_factory.mktemp("dask")
    scheduler, worker = (load_pods()[name]["containers"][0] for name in ("scheduler", "worker"))
    ports = {"8786": free_port(), "8787": free_port(), "8788": free_port(), "8789": free_port(), "8790": free_port()}
    address = f"tls://127.0.0.1:{ports['8786']}"
    environment = os.environ | tls_environment(certificates)
    environment |= {each["name"]: each.get("value", N_THREADS) for each in [*scheduler["env"], *worker["env"]]}
    replaced = {"$(HALOSEG_CLUSTER)": address, "$(DASK_WORKER_NAME)": "one", "/tmp": str(folder)}
    for port, here in ports.items():
        replaced |= {port: str(here), f":{port}": f"127.0.0.1:{here}"}
    started = []
    for container in (scheduler, worker):
        words = [replaced.get(word, word) for word in container["args"]]
        assert words[0] == "dask"
        command = [sys.executable, "-m", f"distributed.cli.dask_{words[1]}", *words[2:], "--host", "127.0.0.1"]
        with (folder / f"{words[1]}.log").open("w") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    http = {"scheduler": f"http://127.0.0.1:{ports['8787']}", "worker": f"http://127.0.0.1:{ports['8790']}"}
    try:
        with Client(address, security=security(certificates), timeout=30, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=30)
            yield client, http
    finally:
        for process in reversed(started):
            for each in (*children(process), process):
                each.kill()
            process.wait(30)


def load_pods():
    text = (DEPLOY / "kubernetes/base/dask.yaml").read_text().split("\n---\n")[0]
    spec = yaml.safe_load(text)["spec"]
    return {name: spec[name]["spec"] for name in ("scheduler", "worker")}


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def test_a_client_with_the_certificate_has_its_work_done(cluster):
    client, _ = cluster
    assert client.submit(pow, 2, 10, resources={"GPU": 1}).result(30) == 1024
    (worker,) = client.scheduler_info()["workers"].values()
    assert worker["id"] == "one"


def refused(error, match, address, security):
    """See that no client comes up, and collect what is left of it.

    Left to itself, the collector may close it (``Client.__del__``) while the next client's loop starts, whose lock the
    same thread would then wait for, for ever (distributed 2026.8). A stream that the scheduler reset is never
    collected, and its error has the client in its frames.
    """
    with pytest.raises(error, match=match) as refusal:
        Client(address, security=security, timeout=3, set_as_default=False)
    cause = refusal.value
    del refusal
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is Client and each.status != "running"]


def test_a_client_without_certificate_or_with_a_strangers_is_refused(cluster, certificates, tmp_path):
    client, _ = cluster
    address = client.scheduler.address
    assert make_certificates(tmp_path / "stranger").returncode == 0
    other = security(tmp_path / "stranger")
    none = Security(tls_ca_file=f"{certificates}/ca.pem", require_encryption=True)
    refused(OSError, "TLS certificate does not match", address, other)
    refused(TypeError, "ssl_context", address, none)
    refused(OSError, "closed", address.replace("tls://", "tcp://"), None)
    host, port = address.removeprefix("tls://").split(":")
    bare = ssl.create_default_context(cafile=certificates / "ca.pem")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        bare.wrap_socket(plain, server_hostname="localhost") as encrypted,
        pytest.raises(ssl.SSLError, match="certificate required"),
    ):
        encrypted.recv(1)
    assert client.submit(pow, 3, 3).result(30) == 27


def test_a_worker_has_the_threads_that_its_pod_asks_for(cluster):
    client, _ = cluster
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    (seen,) = client.run(lambda: [os.environ[name] for name in names]).values()
    assert seen == [N_THREADS] * 3
    compose = load("compose.yaml")["services"]
    workers = [each for name, each in compose.items() if name.startswith("dask-worker")]
    assert all(each["environment"][name] == "${HALOSEG_THREADS:-4}" for each in workers for name in names)
    for path in ("slurm/segment.sbatch", "slurm/dask.yaml"):
        assert all(f"{name}=" in (DEPLOY / path).read_text() for name in names)


def test_health_and_metrics_are_where_the_pods_say(cluster):
    _, http = cluster
    assert {get(f"{each}/health") for each in http.values()} == {"ok"}
    told = {name: samples(get(f"{each}/metrics")) for name, each in http.items()}
    assert "dask_scheduler_workers" in told["scheduler"]
    assert told["worker"] >= {name for name in ASKED if name.startswith(("haloseg_", "dask_worker_"))}
    assert told["scheduler"] | told["worker"] >= ASKED


def test_the_operator_can_ask_how_many_workers_are_of_use(cluster):
    client, http = cluster
    assert isinstance(json.loads(get(f"{http['scheduler']}/api/v1/adaptive_target"))["workers"], int)
    assert "api" in load_pods()["scheduler"]["containers"][0]["env"][0]["value"]
    assert load("kubernetes/base/kustomization.yaml")["namespace"] == "haloseg"
    del client


def test_our_own_runner_works_through_it(cluster, certificates):
    client, _ = cluster
    program = (
        "import sys\nfrom pipeline.compute.cluster import open_runner\n"
        "with open_runner(cluster=sys.argv[1], n_workers=1) as run:\n    print(run.client.scheduler.address)\n"
    )
    words = [sys.executable, "-c", program, client.scheduler.address]
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("DASK_")}
    known = subprocess.run(
        words, env=quiet | tls_environment(certificates), capture_output=True, text=True, check=False, cwd=DEPLOY.parent
    )
    assert (known.returncode, known.stdout.strip()) == (0, client.scheduler.address), known.stderr
    stranger = subprocess.run(words, env=quiet, capture_output=True, text=True, check=False, cwd=DEPLOY.parent)
    assert stranger.returncode == 1
    assert "a Dask scheduler must answer at" in stranger.stderr
    until(lambda: client.status == "running", what="the cluster lives")
