"""The files for Prometheus and Grafana agree with each other and with what they watch."""

import re
import shutil
import subprocess
from itertools import combinations

import pytest

from server.ports import Ports
from tests.unit.fakes import make_calibration
from tests.unit.observability import (
    FOLDER,
    alerts,
    dashboard,
    expressions,
    panel_expressions,
    read,
    recorded,
    rules,
)
from tests.unit.promql import grouping_labels, metric, selectors
from tests.unit.router_parts import CERTIFIED, backend, deployed, make_metrics

__all__ = ["backend", "deployed", "make_metrics"]  # fixtures

ROOT = FOLDER.parents[1]

# --- the dashboard -----------------------------------------------------------------------------


def test_every_panel_has_an_id_of_its_own_a_title_and_words():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 14
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert all(panel["description"] for panel in panels)


def test_every_panel_asks_something_of_the_chosen_prometheus():
    variable = {"type": "prometheus", "uid": "${datasource}"}
    for panel in dashboard()["panels"]:
        assert panel["datasource"] == variable, panel["title"]
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["expr"] and target["datasource"] == variable, panel["title"]
    (chosen,) = (v for v in dashboard()["templating"]["list"] if v["name"] == "datasource")
    assert (chosen["type"], chosen["query"]) == ("datasource", "prometheus")


def test_every_variable_in_a_panel_is_one_that_the_dashboard_or_grafana_has():
    assert not [pair for pair in panel_expressions() if "$" in pair[1]]


def test_panels_lie_side_by_side_in_the_grid():
    places = [(panel["title"], panel["gridPos"]) for panel in dashboard()["panels"]]
    assert all(place["x"] + place["w"] <= 24 for _, place in places)
    for (title, a), (other, b) in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, f"{title!r} overlaps {other!r}"


# --- the rules ---------------------------------------------------------------------------------


def test_every_alert_says_how_bad_it_is_what_it_saw_and_what_to_do():
    assert len(alerts()) >= 10
    for name, alert in alerts().items():
        assert alert["labels"]["severity"] in ("critical", "warning"), name
        assert len(alert["annotations"]["summary"]) < 160, name
        assert len(alert["annotations"]["description"]) > 60, name


def test_every_alert_waits_but_those_whose_evidence_is_gathered():
    assert [name for name, alert in alerts().items() if "for" not in alert] == [
        "AdaptiveVitCertificateContradicted",
        "AdaptiveVitRetreated",
    ]


def test_the_readme_lists_every_alert_with_its_severity():
    listed = re.findall(
        r"^\| (AdaptiveVit\w+) \| (\w+) \|", (FOLDER / "README.md").read_text(), re.M
    )
    severities = {name: alert["labels"]["severity"] for name, alert in alerts().items()}
    assert dict(listed) == severities and len(listed) == len(severities)


def test_every_alert_has_a_case_in_which_it_fires():
    fired = set()
    for case in read("alerts_test.yml")["tests"]:
        for test in case["promql_expr_test"]:
            for sample in test["exp_samples"]:
                fired.update(re.findall(r'alertname="(\w+)"', sample["labels"]))
    assert fired == set(alerts())


def test_what_is_recorded_is_used_and_what_is_used_is_recorded():
    used = {metric(s) for expression in expressions() for s in selectors(expression)}
    assert {name for name in used if ":" in name} == recorded()


def test_the_rules_select_the_job_that_is_scraped():
    (job,) = read("prometheus.yml")["scrape_configs"]
    jobs = {name for rule in rules() for name in re.findall(r'job="(\w+)"', rule["expr"])}
    assert jobs == {job["job_name"]}
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{Ports().metrics}"]}]


@pytest.fixture
def exported(backend, make_metrics):
    """The label sets of each series of a router that live traffic certifies, with a shadow."""
    live = {"chosen_by": {**CERTIFIED["chosen_by"], "method": "live"}}
    figures = {"escalation_rate": 0.1}
    make_metrics(make_calibration(**{**CERTIFIED, **live, "metrics": figures}), candidate=2)
    return {name: [dict(labels) for labels in found] for name, found in backend.series.items()}


def has(exported, selector):
    """Whether one of the router's series is selected, whatever server it is from."""
    name = re.sub(r"_(bucket|count|sum)$", "", metric(selector))
    wanted = re.findall(r'(\w+)=(~?)"([^"]*)"', selector)
    return any(
        all(
            re.fullmatch(value if is_pattern else re.escape(value), labels.get(label, ""))
            for label, is_pattern, value in wanted
            if label not in ("job", "instance")
        )
        for labels in exported.get(name, [])
    )


def test_every_series_of_the_router_that_the_files_name_is_one_that_it_has(exported):
    named = {s for expression in expressions() for s in selectors(expression)}
    routers = {s for s in named if metric(s).startswith("adaptive_vit_")}
    assert len({metric(selector) for selector in routers}) > 15
    assert [selector for selector in sorted(routers) if not has(exported, selector)] == []
    assert not has(exported, 'adaptive_vit_images_total{path="hihg"}')
    assert not has(exported, "adaptive_vit_request_total")


def test_every_series_of_the_router_is_on_the_dashboard_or_in_the_rules_and_described(exported):
    used = {metric(s) for expression in expressions() for s in selectors(expression)}
    used = {re.sub(r"_(bucket|count|sum)$", "", name) for name in used}
    assert set(exported) <= used
    described = (FOLDER.parents[1] / "docs/operations.md").read_text()
    assert [name for name in exported if f"`{name}" not in described] == []


def test_every_metric_that_the_documents_name_is_one_that_is_exported(exported):
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").rglob("*.*")]
    named = {
        re.sub(r"_(bucket|count|sum)$", "", name)
        for document in documents
        if document.name != "CHANGELOG.md" and document.is_file()
        for name in re.findall(r"\b(?:nv|adaptive_vit)_[a-z_]+\b", document.read_text("utf-8"))
    }
    groups = {group["name"] for group in read("alerts.yml")["groups"]}
    # tests/triton/test_observability.py asks the real server for all that the files name.
    tritons = {metric(s) for e in expressions() for s in selectors(e) if s.startswith("nv_")}
    tritons = {re.sub(r"_(bucket|count|sum)$", "", name) for name in tritons}
    assert len(tritons) >= 4 and len(named) > 20
    assert sorted(named - set(exported) - groups - tritons) == []


# --- compose -----------------------------------------------------------------------------------


def test_compose_pins_its_images_and_mounts_what_is_there():
    services = read("compose.yaml")["services"]
    assert set(services) == {"prometheus", "grafana"}
    for service in services.values():
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])
        files = [volume for volume in service["volumes"] if volume.startswith("./")]
        assert all(volume.endswith(":ro") for volume in files)
        assert all((FOLDER / volume.split(":")[0]).is_file() for volume in files)


def test_compose_binds_loopback_and_grafana_finds_prometheus_and_the_dashboard():
    services = read("compose.yaml")["services"]
    (listen,) = (a for a in services["prometheus"]["command"] if "listen-address" in a)
    (source,) = read("grafana/datasource.yml")["datasources"]
    assert listen == "--web.listen-address=" + source["url"].removeprefix("http://")
    assert listen.startswith("--web.listen-address=127.0.0.1:")
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    (provider,) = read("grafana/dashboard.yml")["providers"]
    places = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert any(place.startswith(provider["options"]["path"] + "/") for place in places)


# --- fetching Prometheus -----------------------------------------------------------------------


@pytest.fixture
def script(tmp_path):
    """A copy of the script in a checkout of its own, with nothing fetched."""
    place = tmp_path / "checkout/deploy/observability"
    place.mkdir(parents=True)
    return shutil.copy(FOLDER / "fetch_prometheus.sh", place)


@pytest.fixture
def tools(tmp_path):
    """A directory for PATH with what the script itself needs, and nothing to fetch with."""
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "dirname").symlink_to(shutil.which("dirname"))
    return folder


def fetch(script, path):
    return subprocess.run(
        ["/bin/sh", script], env={"PATH": str(path)}, capture_output=True, text=True
    )


def test_a_prometheus_on_path_is_used(script, tools, tmp_path):
    (tmp_path / "own").mkdir()
    for name in ("prometheus", "promtool"):
        (tmp_path / "own" / name).write_text("#!/bin/sh\n")
        (tmp_path / "own" / name).chmod(0o755)
    done = fetch(script, f"{tmp_path / 'own'}:{tools}")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'own'}\n")


def test_where_nothing_can_be_fetched_one_line_says_what_to_do(script, tools):
    done = fetch(script, tools)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert re.match("error: .*no apt-get.*put prometheus and promtool .* on PATH", done.stderr)


# --- reading expressions -----------------------------------------------------------------------


def test_the_names_in_an_expression_are_found():
    expression = """
      histogram_quantile(0.99, sum by (job, le) (rate(a_bucket{path="low"}[5m] offset 1h))) > 2e3
      and on (job) group_left (version) b:c:rate5m unless d_total{reason=~"x|y"} * 1e6 or vector(0)
    """
    assert selectors(expression) == {'a_bucket{path="low"}', "b:c:rate5m", 'd_total{reason=~"x|y"}'}
    assert grouping_labels(expression) == {"job", "le", "version"}
