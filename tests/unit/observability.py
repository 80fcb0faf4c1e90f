"""The files of deploy/observability, read for the tests."""

import json
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "deploy/observability"
# What Grafana puts in place of its variables before it asks Prometheus.
VARIABLES = {"$__rate_interval": "1m", "$instance": ".+"}


def read(name):
    return yaml.safe_load((FOLDER / name).read_text())


def rules():
    return [rule for group in read("alerts.yml")["groups"] for rule in group["rules"]]


def alerts():
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def recorded():
    return {rule["record"] for rule in rules() if "record" in rule}


def dashboard():
    return json.loads((FOLDER / "grafana-dashboard.json").read_text())


def panel_expressions():
    """(panel's title, expression), with Grafana's variables filled in."""
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


def expressions():
    """Every expression of the rules and the dashboard."""
    return [rule["expr"] for rule in rules()] + [
        expression for _, expression in panel_expressions()
    ]
