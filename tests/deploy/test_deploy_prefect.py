"""The deployments: read as they are, and registered on a real Prefect server that asks for a password."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from importlib import import_module

import httpx
import pytest
import yaml
from deploy_files import BIN, DEPLOY, ROOT, free_port, load, load_json, until
from queries import samples

PREFECT = load("prefect.yaml")
DEPLOYMENTS = {each["name"]: each for each in PREFECT["deployments"]}
AUTOMATIONS = {each["name"]: each for each in load("automations.yaml")["automations"]}
GIVEN = {
    "HALOSEG_CLUSTER": "tls://dask-scheduler:8786", "HALOSEG_ROOTS": "/data,s3://scans", "HALOSEG_ARCHIVE": "/data/in",
    "HALOSEG_MODEL": "cells", "HALOSEG_MODELS": "/data/models", "HALOSEG_IMAGE": "haloseg:0.1.0-cpu",
    "HALOSEG_TRAIN_GPUS": "1", "HALOSEG_CLUSTERS": "tls://dask-scheduler:8786",
}  # fmt: skip
AUTH = ("haloseg", "not:a real one")


def entry_point(deployment):
    path, _, name = deployment["entrypoint"].partition(":")
    return ROOT / path, name


def signature(deployment):
    path, name = entry_point(deployment)
    if not path.exists():
        pytest.skip(f"needs {path.relative_to(ROOT)}")
    flow = getattr(import_module(f"flows.{path.stem}"), name)
    return inspect.signature(flow.fn)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_parameters_of_a_deployment_are_those_of_its_flow(name):
    parameters = signature(DEPLOYMENTS[name]).parameters
    given = DEPLOYMENTS[name].get("parameters", {})
    assert set(given) <= set(parameters)
    needed = {name for name, each in parameters.items() if each.default is each.empty}
    if DEPLOYMENTS[name].get("schedules"):
        assert needed <= set(given)  # nobody is there to ask
    if "cluster" in parameters:
        assert given["cluster"] == "{{ $HALOSEG_CLUSTER }}"


def test_one_archive_run_at_a_time_every_night():
    nightly = DEPLOYMENTS["archive-nightly"]
    assert nightly["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    (schedule,) = nightly["schedules"]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", schedule["cron"])
    assert [name for name, each in DEPLOYMENTS.items() if each.get("schedules")] == ["archive-nightly"]


def test_every_variable_is_one_that_the_script_asks_for():
    asked = set(re.findall(r"\$\{(HALOSEG_\w+)", (DEPLOY / "register.sh").read_text()))
    used = set(re.findall(r"\{\{ \$(HALOSEG_\w+) \}\}", (DEPLOY / "prefect.yaml").read_text()))
    assert used == asked == {*GIVEN, "HALOSEG_HOME"}


def test_the_version_of_prefect_is_the_pinned_one():
    pins = (DEPLOY / "constraints.txt").read_text().splitlines()
    assert f"prefect=={PREFECT['prefect-version']}" in pins


def test_nothing_secret_is_in_a_deployment():
    assert not re.search(r"(?i)password|auth_string|access_key|token", (DEPLOY / "prefect.yaml").read_text())


def test_a_silent_flow_run_is_given_up_after_several_heartbeats():
    automation = AUTOMATIONS["haloseg: flow run without heartbeat"]
    beats = int(PREFECT["definitions"]["pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert automation["trigger"]["within"] > 3 * beats
    assert "prefect.flow-run.Suspended" in automation["trigger"]["expect"]  # a paused run is not a dead one


def test_registering_asks_for_what_it_needs_before_it_does_anything():
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("HALOSEG_")}
    done = subprocess.run(
        [DEPLOY / "register.sh", "process"], cwd=ROOT, capture_output=True, text=True, check=False, env=quiet
    )
    assert done.returncode != 0
    assert "HALOSEG_CLUSTER" in done.stderr


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Run a Prefect server with a password, and return the environment of its clients."""
    folder, port = tmp_path_factory.mktemp("prefect"), free_port()
    auth = ":".join(AUTH)
    environment = os.environ | GIVEN | {
        "PREFECT_HOME": str(folder), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_API_AUTH_STRING": auth, "PREFECT_API_AUTH_STRING": auth,
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(folder / "ui"), "PREFECT_SERVER_METRICS_ENABLED": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PATH": f"{BIN}:{os.environ['PATH']}",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
    }  # fmt: skip
    command = [BIN / "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: healthy(environment["PREFECT_API_URL"]), what="the server answers")
        yield environment
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def healthy(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def register(environment, *words):
    return subprocess.run(
        [DEPLOY / "register.sh", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_registering_makes_pool_and_deployments_and_each_automation_once(server):
    for each in DEPLOYMENTS.values():
        if not entry_point(each)[0].exists():
            pytest.skip(f"needs {each['entrypoint']}")
    done = register({name: value for name, value in server.items() if name != "HALOSEG_CLUSTERS"}, "process")
    assert done.returncode == 0, done.stdout + done.stderr
    again = subprocess.run([sys.executable, DEPLOY / "automations.py"], env=server, check=True, capture_output=True)
    assert again.stdout.decode().count("automation ") == len(AUTOMATIONS)
    with httpx.Client(base_url=server["PREFECT_API_URL"], auth=AUTH) as client:
        limit = "/v2/concurrency_limits/haloseg-gpu"
        assert client.get(limit).json()["limit"] == 2
        until(lambda: client.patch(limit, json={"limit": 3}).status_code == 204, what="SQLite has a moment")
        kept = subprocess.run(
            [sys.executable, DEPLOY / "limits.py"], env=server | {"PYTHONPATH": str(ROOT)}, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        assert kept.stdout == "limit haloseg-gpu kept: 3\n"
        assert client.get(limit).json()["limit"] == 3
        made = {each["name"]: each for each in client.post("/deployments/filter", json={}).json()}
        automations = client.post("/automations/filter", json={}).json()
        pool = client.get("/work_pools/haloseg").json()
    assert set(made) == set(DEPLOYMENTS)
    assert pool["type"] == "process"
    assert sorted(each["name"] for each in automations) == sorted(AUTOMATIONS)
    nightly = made["archive-nightly"]
    assert nightly["parameters"] == {
        "archive": "/data/in", "model": "cells", "cluster": GIVEN["HALOSEG_CLUSTER"],
        "budget_hours": 11,
    }  # fmt: skip
    assert nightly["job_variables"]["env"]["HALOSEG_ROOTS"] == "/data,s3://scans"
    assert nightly["job_variables"]["env"]["HALOSEG_CLUSTERS"] == GIVEN["HALOSEG_CLUSTER"]
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert nightly["pull_steps"] == [
        {"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}
    ]  # fmt: skip
    assert {each["work_queue_name"] for each in made.values()} == {"default", "train"}
    forms = {name: each["parameter_openapi_schema"]["properties"] for name, each in made.items()}
    assert sum(map(len, forms.values())) > 30
    assert [(name, each) for name, form in forms.items() for each in form if not form[each].get("description")] == []
    assert "$" not in json.dumps([each["parameters"] | each["job_variables"] for each in made.values()])


def test_the_server_schedules_the_nightly_run(server):
    # SQLAlchemy 2.1 with Prefect 3.8.8 makes deployments that never run
    def scheduled():
        with httpx.Client(base_url=server["PREFECT_API_URL"], auth=AUTH) as client:
            wanted = {"deployments": {"name": {"any_": ["archive-nightly"]}}}
            return client.post("/flow_runs/filter", json=wanted).json()

    if not entry_point(DEPLOYMENTS["archive-nightly"])[0].exists():
        pytest.skip("needs flows/archive.py")
    assert until(scheduled, what="a run is scheduled")[0]["state_type"] == "SCHEDULED"


def test_without_the_password_only_health_is_told(server):
    url = server["PREFECT_API_URL"]
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.post(f"{url}/deployments/filter", json={}).status_code == 401
    assert httpx.get(f"{url}/metrics").status_code == 401
    assert "process_resident_memory_bytes" in samples(httpx.get(f"{url}/metrics", auth=AUTH).text)
    (job,) = [each for each in yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
              if each["job_name"] == "prefect-server"]  # fmt: skip
    assert (job["metrics_path"], job["basic_auth"]["username"]) == ("/api/metrics", AUTH[0])


def test_a_pool_of_kubernetes_takes_the_job_template(server):
    template = load_json("kubernetes/base/base-job-template.json")
    with httpx.Client(base_url=server["PREFECT_API_URL"], auth=AUTH) as client:
        pool = {"name": "cluster", "type": "kubernetes", "base_job_template": template}
        made = client.post("/work_pools/", json=pool)
        kept = client.get("/work_pools/cluster").json()["base_job_template"]
    assert made.status_code == 201, made.text
    assert kept == template
