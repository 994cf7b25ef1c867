"""The Kubernetes objects, rendered by kustomize where there is one, and as they are written; there is no cluster."""

import json
import re
import subprocess

import pytest
import yaml
from deploy_files import DEPLOY, load, load_json, strings, substituted, tool

BASE = DEPLOY / "kubernetes/base"
OVERLAYS = sorted(path.name for path in (DEPLOY / "kubernetes/overlays").iterdir())
RENDERER = [tool("kubectl"), "kustomize"] if tool("kubectl") else [tool("kustomize"), "build"]
KUBERNETES = "1.33"


def documents(text):
    return [each for each in yaml.safe_load_all(text) if each]


def render(overlay):
    if RENDERER[0] is None:
        pytest.skip("needs kubectl or kustomize")
    folder = DEPLOY / "kubernetes" / (f"overlays/{overlay}" if overlay else "base")
    done = subprocess.run([*RENDERER, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def written():
    """Return the objects of the base as they are written."""
    return [each for name in load("kubernetes/base/kustomization.yaml")["resources"]
            for each in documents((BASE / name).read_text())]  # fmt: skip


def job(**values):
    """Return the job of a flow run, as the worker makes it from the template."""
    template = load_json("kubernetes/base/base-job-template.json")
    known = {name: each.get("default", f"a-{name}") for name, each in template["variables"]["properties"].items()}
    made = substituted(template["job_configuration"]["job_manifest"], known | values)
    container = made["spec"]["template"]["spec"]["containers"][0]
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    container["args"] = ["prefect", "flow-run", "execute"]
    return made


def pods(objects):
    """Yield (name, labels, pod spec) of everything that becomes a pod."""
    for each in objects:
        name, spec = f"{each['kind']}/{each['metadata'].get('name', 'flow-run')}", each.get("spec", {})
        if each["kind"] == "DaskCluster":
            for part in ("scheduler", "worker"):
                labels = {"dask.org/cluster-name": each["metadata"]["name"], "dask.org/component": part}
                yield f"{name}/{part}", labels, spec[part]["spec"]
        elif "template" in spec:
            yield name, spec["template"]["metadata"]["labels"], spec["template"]["spec"]


def all_pods():
    return list(pods([*written(), job()]))


def by_kind(objects, kind):
    return [each for each in objects if each["kind"] == kind]


POD_NAMES = [name for name, _, _ in all_pods()]


@pytest.fixture(params=all_pods(), ids=POD_NAMES)
def pod(request):
    return request.param


def test_there_are_six_kinds_of_pod():
    assert len(POD_NAMES) == 6, POD_NAMES


def test_a_pod_has_no_rights(pod):
    _, _, spec = pod
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert min(security["runAsUser"], security["runAsGroup"]) > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert all("hostPath" not in volume for volume in spec["volumes"])
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        assert {"memory"} <= set(container["resources"]["limits"])
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])


def test_only_the_prefect_worker_has_a_token_of_the_cluster(pod):
    name, _, spec = pod
    assert spec.get("automountServiceAccountToken", True) == (name == "Deployment/haloseg-prefect-worker")


def test_what_runs_for_long_is_asked_whether_it_lives(pod):
    name, _, spec = pod
    if not name.startswith("Job/"):
        assert all("livenessProbe" in container for container in spec["containers"])


def test_volumes_that_are_mounted_exist_and_are_writable_only_where_data_is(pod):
    _, _, spec = pod
    known = {volume["name"]: volume for volume in spec["volumes"]}
    known |= {"data": {"persistentVolumeClaim": {}}}
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        for mount in container["volumeMounts"]:
            volume = known[mount["name"]]
            assert mount.get("readOnly", False) == bool({"secret", "configMap"} & set(volume))


def test_secrets_are_referred_to_and_never_written():
    objects = [*written(), job()]
    assert by_kind(objects, "Secret") == []
    for path, text in [pair for each in objects for pair in strings(each)]:
        assert "-----BEGIN" not in text, path
    for _, _, spec in pods(objects):
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            for entry in container.get("env", []):
                if re.search(r"PASSWORD$|AUTH_STRING$", entry["name"]):
                    assert "secretKeyRef" in entry["valueFrom"], entry["name"]
    settings = (BASE / "settings.env").read_text()
    assert not re.search(r"PASSWORD|AUTH|ACCESS_KEY", settings)


def test_the_runbook_makes_every_secret_that_is_referred_to():
    text = "\n".join(path.read_text() for path in BASE.iterdir())
    reference = r'secretKeyRef: \{name: ([\w-]+)|secretName"?: "?([\w-]+)|"?secretRef"?: \{"?name"?: "?([\w-]+)'
    named = set(re.findall(reference, text))
    names = {name for groups in named for name in groups if name}
    assert {"haloseg-prefect", "haloseg-postgres", "haloseg-dask-tls", "haloseg-object-store"} == names
    runbook = (DEPLOY / "README.md").read_text()
    assert [name for name in names if f"create secret generic {name}" not in runbook] == []


def selected(policy, labels):
    wanted = policy.get("podSelector", policy.get("selector", {})).get("matchLabels", {})
    return wanted.items() <= labels.items()


def test_every_pod_has_its_own_network_policy_beside_the_one_that_denies_all():
    policies = {each["metadata"]["name"]: each["spec"] for each in by_kind(written(), "NetworkPolicy")}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, labels, _ in all_pods():
        own = [each for each in policies.values() if each["podSelector"] and selected(each, labels)]
        assert own, name


def test_who_must_talk_may():
    policies = [each["spec"] for each in by_kind(written(), "NetworkPolicy")]
    labels = {name: each for name, each, _ in all_pods()}
    server, postgres = labels["Deployment/haloseg-prefect-server"], labels["StatefulSet/haloseg-postgres"]
    prefect_worker, flow = labels["Deployment/haloseg-prefect-worker"], labels["Job/flow-run"]
    scheduler, worker = labels["DaskCluster/haloseg/scheduler"], labels["DaskCluster/haloseg/worker"]

    def may(source, target, port):
        def open_(mine, theirs, way, peers):
            rules = [rule for each in policies if selected(each, mine) for rule in each.get(way, [])]
            return any(
                any("podSelector" in peer and selected(peer, theirs) for peer in rule.get(peers, []))
                and port in [each["port"] for each in rule["ports"]]
                for rule in rules
            )

        return open_(source, target, "egress", "to") and open_(target, source, "ingress", "from")

    allowed = [
        (server, postgres, 5432), (prefect_worker, server, 4200), (flow, server, 4200), (flow, scheduler, 8786),
        (worker, scheduler, 8786), (scheduler, worker, 8788), (worker, worker, 8788),
    ]  # fmt: skip
    denied = [
        (flow, postgres, 5432), (flow, worker, 8788), (worker, server, 4200), (prefect_worker, scheduler, 8786),
        (server, scheduler, 8786), (flow, scheduler, 8787), (worker, postgres, 5432),
    ]  # fmt: skip
    assert all(may(*each) for each in allowed)
    assert not any(may(*each) for each in denied)


def test_disruption_budgets_and_services_select_pods_that_there_are():
    objects = written()
    labels = [each for _, each, _ in all_pods()]
    budgets = by_kind(objects, "PodDisruptionBudget")
    assert len(budgets) == 3
    for budget in budgets:
        assert sum(budget["spec"]["selector"]["matchLabels"].items() <= each.items() for each in labels) == 1
    (cluster,) = by_kind(objects, "DaskCluster")
    services = [each["spec"] for each in by_kind(objects, "Service")] + [cluster["spec"]["scheduler"]["service"]]
    for service in services:
        (spec,) = [spec for _, each, spec in all_pods() if service["selector"].items() <= each.items()]
        names = {port["name"] for container in spec["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["ports"]} <= names


def test_the_dask_cluster_is_as_the_operator_needs_it():
    (cluster,) = by_kind(written(), "DaskCluster")
    (scaler,) = by_kind(written(), "DaskAutoscaler")
    names = {port["name"] for port in cluster["spec"]["scheduler"]["service"]["ports"]}
    assert names == {"tcp-comm", "http-dashboard"}
    worker = cluster["spec"]["worker"]["spec"]["containers"][0]
    assert worker["args"][worker["args"].index("--name") + 1] == "$(DASK_WORKER_NAME)"
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert scaler["spec"]["cluster"] == cluster["metadata"]["name"]
    assert 1 <= scaler["spec"]["minimum"] <= scaler["spec"]["maximum"]


def test_a_flow_run_gets_the_gpus_that_its_deployment_asks_for():
    limits = [job(gpus=gpus)["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] for gpus in ("0", "1")]
    assert [each["nvidia.com/gpu"] for each in limits] == ["0", "1"]
    text = json.dumps(load_json("kubernetes/base/base-job-template.json")["job_configuration"])
    known = load_json("kubernetes/base/base-job-template.json")["variables"]["properties"]
    assert set(re.findall(r"\{\{ (\w+) \}\}", text)) == set(known)


def test_flow_runs_and_workers_find_scheduler_and_server_by_the_names_that_there_are():
    settings = (BASE / "settings.env").read_text()
    services = {each["metadata"]["name"] for each in by_kind(written(), "Service")} | {"haloseg-scheduler"}
    hosts = re.findall(r"//([\w-]+)\.haloseg\.svc\.cluster\.local", settings)
    assert len(hosts) == 2
    assert set(hosts) <= services


@pytest.mark.parametrize("overlay", [None, *OVERLAYS])
def test_every_rendered_object_is_valid_kubernetes(overlay):
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    objects = [each for each in render(overlay) if not each["apiVersion"].startswith("kubernetes.dask.org/")]
    assert len(objects) > 15
    flow_run = job(gpus="1")
    # prefect-kubernetes demands these two where Kubernetes knows none of them, and takes no notice
    assert [flow_run["spec"]["template"]["spec"].pop(name) for name in ("parallelism", "completions")] == [1, 1]
    dask = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "dask", "labels": labels}, "spec": spec}
        for name, labels, spec in pods(render(overlay)) if name.startswith("DaskCluster")
    ]  # fmt: skip
    assert len(dask) == 2
    for each in [*objects, flow_run, *dask]:
        validate.validate(each, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_puts_one_image_everywhere(overlay):
    objects = render(overlay)
    chosen = load(f"kubernetes/overlays/{overlay}/kustomization.yaml")["images"][0]
    image = f"{chosen.get('newName', chosen['name'])}:{chosen['newTag']}"
    found = [text for each in objects for path, text in strings(each) if re.fullmatch(r"\S*haloseg:\S+", text)]
    assert set(found) == {image}
    assert len(found) == 6  # server, register and its HALOSEG_IMAGE, Prefect worker, Dask scheduler and worker
    assert {each["metadata"].get("namespace") for each in objects} == {None, "haloseg"}  # None is the namespace itself


def test_the_overlay_without_gpus_has_none():
    (cluster,) = by_kind(render("cpu"), "DaskCluster")
    container = cluster["spec"]["worker"]["spec"]["containers"][0]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert container["args"][-2:] == ["--death-timeout", "60"]


def test_overlays_hold_one_copy_of_the_image_fields():
    copies = {(DEPLOY / f"kubernetes/overlays/{name}/image-fields.yaml").read_text() for name in OVERLAYS}
    assert len(copies) == 1
