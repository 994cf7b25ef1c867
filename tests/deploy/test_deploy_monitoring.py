"""Prometheus and Grafana: what they read fits what the services are called, and the rules fire when they should.

That every metric they ask for is served is seen where services run: test_deploy_dask_tls, test_deploy_prefect.
"""

import ast
import re
import subprocess
from fnmatch import fnmatch

import pytest
from deploy_files import DEPLOY, ROOT, load, tool
from queries import ALERTS, ASKED, PANELS, QUERIES, metrics, samples

from pipeline.compute.metrics import WORKS


def test_metrics_are_found_in_a_query_and_values_in_a_page():
    assert metrics('sum by (a) (rate(x_total{b="c"}[5m])) / y > 0.3 or vector(0)') == {"x_total", "y"}
    assert metrics("rate(x[$__rate_interval]) unless x offset 15m > 0") == {"x"}
    assert samples('# HELP a Told\n# TYPE a counter\nb{c="d"} 1.0\ne 2\n') == {"b", "e"}


def kinds_of_work():
    """Return the classes whose blocks workers run: those with the methods of a BlockWork."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "pipeline").rglob("*.py")]
    classes = [each for tree in trees for each in tree.body if isinstance(each, ast.ClassDef)]
    methods = {each.name: {part.name for part in each.body if isinstance(part, ast.FunctionDef)} for each in classes}
    return {name for name, has in methods.items() if {"setup", "run"} <= has} - {"BlockWork", "ResidentWork"}


def test_every_kind_of_work_is_counted_from_nought_on():
    assert set(WORKS) == kinds_of_work()


def test_stages_works_and_jobs_that_are_named_exist():
    jobs = {each["job_name"] for each in load("prometheus/prometheus.yml")["scrape_configs"]}
    named = [names.split("|") for query in QUERIES for names in re.findall(r'job=~?"([\w|-]+)"', query)]
    assert {name for names in named for name in names} <= jobs
    stages = {name for query in QUERIES for name in re.findall(r'stage="(\w+)"', query)}
    assert stages <= {"read", "wait", "compute", "write"}
    works = {name for query in QUERIES for name in re.findall(r'work=~"([\w.*]+)"', query)}
    assert all([each for each in WORKS if fnmatch(each, name.replace(".*", "*"))] for name in works)


def test_all_that_we_serve_is_shown():
    sources = [path.read_text() for path in (ROOT / "pipeline/compute").glob("*.py")]
    ours = {name for text in sources for name in re.findall(r'"(haloseg_\w+)"', text)} - {"haloseg_installed"}
    assert len(ours) > 8
    assert {name.removesuffix("_total") for name in ASKED} >= ours


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_is_explained_and_in_the_runbook(name):
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"]["summary"]
    assert f"| `{name}` |" in (DEPLOY / "README.md").read_text()


def test_prometheus_finds_every_service_where_compose_has_it():
    services = load("compose.yaml")["services"]
    aliases = {alias for each in services.values() if isinstance(each.get("networks"), dict)
               for alias in each["networks"]["default"]["aliases"]}  # fmt: skip
    hosts = set()
    for job in load("prometheus/prometheus.yml")["scrape_configs"]:
        hosts |= {target.split(":")[0] for each in job.get("static_configs", []) for target in each["targets"]}
        hosts |= {name for each in job.get("dns_sd_configs", []) for name in each["names"]}
    assert hosts <= set(services) | aliases
    workers = [each for name, each in services.items() if name.startswith("dask-worker")]
    assert all(each["networks"]["default"]["aliases"] == ["dask-worker"] for each in workers)


def test_grafana_finds_its_data_and_its_dashboards():
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    assert source["jsonData"]["timeInterval"] == load("prometheus/prometheus.yml")["global"]["scrape_interval"]
    (provider,) = load("grafana/provisioning/dashboards/haloseg.yaml")["providers"]
    mounts = load("compose.yaml")["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts


def test_panels_do_not_lie_on_each_other():
    cells = [(x, y) for panel in PANELS for at in [panel["gridPos"]]
             for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])]  # fmt: skip
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


@pytest.mark.skipif(tool("promtool") is None, reason="needs promtool, of Debian's package prometheus")
@pytest.mark.parametrize("words", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")])
def test_promtool_takes_the_rules_and_they_fire_when_they_should(words):
    done = subprocess.run(
        [tool("promtool"), *words], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
