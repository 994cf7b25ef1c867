"""Prometheus and Grafana: every metric that an alert or a panel asks for is one that somebody serves."""

import re
import subprocess
from functools import cache
from pathlib import Path

import distributed
import prefect
import pytest
from deploy_files import DEPLOY, load, load_json, tool

OURS = {
    "haloseg_beats_total", "haloseg_blocks_total", "haloseg_blocks_failed_total", "haloseg_voxels_total",
    "haloseg_seconds_total", "haloseg_peak_rss_bytes", "haloseg_device_bytes",
}  # fmt: skip
OF_EVERY_TARGET = {"up", "process_cpu_seconds_total", "process_resident_memory_bytes"}
ALERTS = {rule["alert"]: rule for group in load("prometheus/alerts.yml")["groups"] for rule in group["rules"]}
PANELS = load_json("grafana/dashboards/haloseg.json")["panels"]
QUERIES = [rule["expr"] for rule in ALERTS.values()] + [each["expr"] for panel in PANELS for each in panel["targets"]]
NOT_METRICS = re.compile(r'"[^"]*"|\b(?:by|on|without)\s*\([^)]*\)|\[\w+\]')
WORDS = {"sum", "rate", "increase", "max", "by", "and", "or", "vector", "without", "on"}


def metrics(query):
    """Return the metrics that a query names, without labels, durations and functions."""
    bare = re.sub(r"\{[^}]*\}", "", NOT_METRICS.sub("", query))
    return set(re.findall(r"\b[a-z_][a-z0-9_]*\b", bare)) - WORDS


@cache
def served_by_dask():
    """Return the names that distributed's sources build, with what the client library may put behind them."""
    names = set()
    for path in Path(distributed.__file__).parent.glob("http/*/prometheus/core.py"):
        text = path.read_text()
        prefix = "dask_" + path.parent.parent.name
        names |= {f"{prefix}_{name}" for name in re.findall(r'build_name\(\s*"(\w+)"', text)}
    return {name + ending for name in names for ending in ("", "_total", "_seconds", "_bytes")}


@cache
def served_by_prefect():
    """Return the names of the counters of Prefect's server; some are made by what it shares with clients."""
    text = "".join(path.read_text() for path in Path(prefect.__file__).parent.rglob("*.py"))
    names = set(re.findall(r'(?:Counter|Gauge|Histogram)\(\s*"(prefect_\w+)"', text))
    return names | {f"{name}_total" for name in names}


def test_metrics_are_found_in_a_query():
    assert metrics('sum by (a) (rate(x_total{b="c"}[5m])) / y > 0.3 or vector(0)') == {"x_total", "y"}


@pytest.mark.parametrize("query", QUERIES)
def test_every_metric_that_is_asked_for_is_served(query):
    asked = metrics(query)
    assert asked
    known = OURS | OF_EVERY_TARGET
    if any(name.startswith("dask_") for name in asked):
        known |= served_by_dask()
    if any(name.startswith("prefect_") for name in asked):
        known |= served_by_prefect()
    assert asked <= known


def test_all_that_we_serve_is_shown():
    assert {name for query in QUERIES for name in metrics(query)} >= OURS


def test_stages_and_jobs_that_are_named_exist():
    jobs = {each["job_name"] for each in load("prometheus/prometheus.yml")["scrape_configs"]}
    assert {name for query in QUERIES for name in re.findall(r'job="([\w-]+)"', query)} <= jobs
    stages = {name for query in QUERIES for name in re.findall(r'stage="(\w+)"', query)}
    assert stages <= {"read", "wait", "compute", "write"}


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
