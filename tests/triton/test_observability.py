"""deploy/observability in a real Prometheus that scrapes the real server."""

import re
import subprocess
import time
import urllib.request
from urllib.parse import urlsplit

import pytest

from calibration.images import SampleImages
from client import GrpcClient
from export.repository import RepositorySettings, assemble
from export.versions import add_version
from tests.commands import said
from tests.servers import running
from tests.triton.prometheus import Prometheus, find
from tests.unit.observability import FOLDER, alerts, expressions, panel_expressions, rules
from tests.unit.promql import grouping_labels, metric, selectors

REQUESTS = 5  # of 32 images like the calibration's
WAIT_S = 60.0
CONTRADICTED = "AdaptiveVitCertificateContradicted"
ONLY_LIVE = {"adaptive_vit_audit_share"}  # of a router that live traffic certifies; not this one


@pytest.fixture(scope="module")
def watched(build, graph_set, tmp_path_factory):
    """A server with all there is to watch: a certificate, an audit of every image, a shadow."""
    folder = tmp_path_factory.mktemp("watched")
    said(
        *("calibration", "fit", "--max-risk", 0.1, "--fidelity", "cosine", "--tolerance", 0.2),
        *("--require-certificate", "--onnx", build / "onnx", "--outputs", build / "outputs.json"),
        *("--out", folder / "calibration.json"),
    )
    settings = RepositorySettings(audit_fraction=1.0)
    repository = assemble(graph_set, folder / "calibration.json", folder / "repository", settings)
    add_version(repository, build / "calibration.json", shadow_fraction=1.0)
    with running(repository, log=folder / "triton.log") as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(watched, tmp_path_factory):
    """Prometheus, with some traffic like the calibration's to show."""
    target = urlsplit(watched.metrics_url).netloc
    with Prometheus(target, tmp_path_factory.mktemp("prometheus")) as running:
        ask(watched, running, [crop.data for crop in SampleImages(32 * REQUESTS, seed=78)])
        running.wait_for("count(adaptive_vit:error_ratio:rate5m)")
        yield running


def ask(server, prometheus, images):
    """Send images, and wait until each was audited, or dropped because too many came at once."""
    looked_at = "sum(adaptive_vit_audited_images_total) + sum(adaptive_vit_audit_dropped_total)"
    before = prometheus.query(looked_at)
    expected = len(images) + (float(before[0]["value"][1]) if before else 0)
    deadline = time.monotonic() + WAIT_S
    with GrpcClient(server.grpc_url) as client:
        for start in range(0, len(images), 32):
            client.infer(images[start : start + 32])
        while not prometheus.query(f"{looked_at} >= {expected}"):
            assert time.monotonic() < deadline, "not every image was audited or dropped"
            # The router audits while it answers; a request with a parameter is not audited.
            client.infer(images[:1], policy="high")


def promtool(*arguments):
    command = [find() / "promtool", *arguments]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def missing(prometheus, wanted):
    """Those selectors that no series answers to."""
    return sorted(s for s in wanted if not prometheus.get("series", **{"match[]": s}))


# --- the files ---------------------------------------------------------------------------------


def test_promtool_finds_nothing_wrong_with_the_files():
    promtool("check", "config", "prometheus.yml")
    assert f"{len(rules())} rules found" in promtool("check", "rules", "alerts.yml")


def test_each_alert_fires_on_its_fault_and_none_while_all_is_well():
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


# --- against the server ------------------------------------------------------------------------


def test_every_rule_is_evaluated_without_an_error(prometheus):
    groups = prometheus.get("rules")["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len(found) == len(rules())
    deadline = time.monotonic() + 30
    while any(rule["health"] == "unknown" for rule in found) and time.monotonic() < deadline:
        time.sleep(0.5)
        groups = prometheus.get("rules")["groups"]
        found = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in found if rule["health"] != "ok"} == {}


def test_every_series_that_the_files_name_exists(prometheus):
    named = {selector for expression in expressions() for selector in selectors(expression)}
    scraped = {selector for selector in named if ":" not in metric(selector)}
    assert len({metric(selector) for selector in scraped}) > 20
    assert set(map(metric, missing(prometheus, scraped))) == ONLY_LIVE
    # Which would be found, as would a misspelt label or value.
    wrong = ['adaptive_vit_images_total{path="hihg"}', "adaptive_vit_request_total"]
    assert missing(prometheus, wrong) == wrong


def test_every_label_that_the_files_group_by_exists(prometheus):
    named = {label for expression in expressions() for label in grouping_labels(expression)}
    assert named <= set(prometheus.get("labels"))


def test_every_expression_of_the_dashboard_gets_an_answer(prometheus):
    empty = [title for title, expr in panel_expressions() if not prometheus.query(expr)]
    # One compares with the day before, which a Prometheus as young as this one has not seen.
    assert empty == ["Distance of the scores from the day before", "Certificate from live traffic"]


def test_what_the_router_counts_is_on_the_dashboard_or_in_the_rules(watched):
    with urllib.request.urlopen(watched.metrics_url, timeout=30) as response:
        # Prometheus 3 refuses a scrape without it.
        assert response.headers["Content-Type"].startswith("text/plain")
        families = set(re.findall(r"^# TYPE (adaptive_vit_\w+)", response.read().decode(), re.M))
    used = {metric(s) for expression in expressions() for s in selectors(expression)}
    used = {re.sub(r"_(bucket|count|sum)$", "", name) for name in used}
    assert families and families <= used


def test_the_certificate_is_contradicted_by_images_unlike_the_calibrations_and_by_no_others(
    watched, prometheus, unlike
):
    seen = prometheus.query("sum(adaptive_vit_audited_images_total)")
    assert float(seen[0]["value"][1]) >= 64, "too many images were dropped from the audit"
    assert (
        prometheus.query("sum(adaptive_vit_certificate_contradicted_total)")[0]["value"][1] == "0"
    )
    firing = f'ALERTS{{alertname="{CONTRADICTED}", alertstate="firing", version="1"}}'
    assert not prometheus.query(firing)

    for _ in range(20):
        ask(watched, prometheus, unlike)
        if prometheus.query("sum(adaptive_vit_certificate_contradicted_total) > 0"):
            break
    prometheus.wait_for(firing)
    found = [
        a for a in prometheus.get("alerts")["alerts"] if a["labels"]["alertname"] == CONTRADICTED
    ]
    assert {alert["labels"]["severity"] for alert in found} == {"critical"}
    assert all("router version 1 at 127.0.0.1:" in a["annotations"]["summary"] for a in found)
    assert {a["annotations"]["description"] for a in found} == {
        alerts()[CONTRADICTED]["annotations"]["description"]
    }
    prometheus.wait_for('adaptive_vit:realised_risk:increase1d{version="1"} > 0.1')
