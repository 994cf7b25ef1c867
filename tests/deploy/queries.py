"""What the alerts and the dashboard ask Prometheus for."""

from __future__ import annotations

import re

from deploy_files import load, load_json

ALERTS = {rule["alert"]: rule for group in load("prometheus/alerts.yml")["groups"] for rule in group["rules"]}
PANELS = load_json("grafana/dashboards/haloseg.json")["panels"]
PANEL_QUERIES = [each["expr"] for panel in PANELS for each in panel["targets"]]
QUERIES = [rule["expr"] for rule in ALERTS.values()] + PANEL_QUERIES
OF_PROMETHEUS = {"up"}
_NOT_METRICS = re.compile(r'"[^"]*"|\b(?:by|on|without)\s*\([^)]*\)|\[\$?\w+\]|\boffset \w+')
_WORDS = {"sum", "rate", "increase", "max", "min", "time", "by", "and", "or", "unless", "vector", "without", "on"}


def metrics(query: str) -> set[str]:
    """Return the metrics that a query names, without labels, durations and functions."""
    bare = re.sub(r"\{[^}]*\}", "", _NOT_METRICS.sub("", query))
    return set(re.findall(r"\b[a-z_][a-z0-9_]*\b", bare)) - _WORDS


def samples(text: str) -> set[str]:
    """Return the metrics of which a page of metrics has a value, not those that it only explains."""
    return set(re.findall(r"^([a-z_][a-z0-9_]*)[ {]", text, re.MULTILINE))


ASKED = {name for query in QUERIES for name in metrics(query)} - OF_PROMETHEUS
