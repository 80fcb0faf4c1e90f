"""Which systems are put under which loads, and which of them is called saturated."""

from dataclasses import replace

import pytest

from perf.measure.levels import closed_levels, open_levels, saturated, saturated_throughput
from perf.measure.suites import FULL, QUICK, SUITES
from tests.unit.perf_measured import make_measured, make_system

NAMES = ["static-low", "static-6", "static-high", "adaptive-0", "adaptive", "ensemble"]
SYSTEMS = [make_system(name) for name in NAMES]
SETS = ("mixed", "easy", "hard")


def slugs(levels):
    return [level.slug for level in levels]


def closed(suite, sets=SETS, http=True, shared_memory=True, systems=SYSTEMS):
    return slugs(closed_levels(suite, systems, sets, http, shared_memory))


# --- closed loops ------------------------------------------------------------------------------


def test_the_quick_suite_measures_what_is_compared_and_the_rest_saturated():
    assert closed(replace(QUICK, concurrency=(1, 4))) == [
        "static-low-mixed-c1-grpc",
        "static-high-mixed-c1-grpc",
        "adaptive-mixed-c1-grpc",
        "static-low-mixed-c4-grpc",
        "static-high-mixed-c4-grpc",
        "adaptive-mixed-c4-grpc",
        "ensemble-mixed-c4-grpc",
        "adaptive-easy-c4-grpc",
        "adaptive-hard-c4-grpc",
        "adaptive-mixed-c4-http",
        "adaptive-mixed-c4-grpc-shm",
    ]


def test_the_full_suite_draws_the_curves_and_measures_the_ends_of_all_others():
    found = closed(replace(FULL, concurrency=(1, 2, 8)))
    curves = ["static-low", "static-high", "adaptive", "ensemble"]
    plain = [f"{name}-mixed-c{c}-grpc" for c in (1, 2, 8) for name in curves]
    others = [name for name in NAMES if name not in curves]
    plain += [f"{name}-mixed-c{c}-grpc" for c in (1, 8) for name in others]
    assert others and found[: len(plain)] == plain
    variants = [
        f"{name}-mixed-c{c}-{kind}"
        for name in ("static-high", "adaptive")
        for c in (1, 8)
        for kind in ("http", "grpc-shm")
    ]
    assert sorted(found[len(plain) :]) == sorted(
        ["adaptive-easy-c8-grpc", "adaptive-hard-c8-grpc", *variants]
    )


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_no_load_is_measured_twice(suite):
    found = closed(suite)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_what_cannot_be_measured_is_left_out(suite):
    assert not any("http" in slug for slug in closed(suite, http=False))
    assert any("shm" in slug for slug in closed(suite, http=False))
    assert not any("shm" in slug for slug in closed(suite, shared_memory=False))
    assert any("http" in slug for slug in closed(suite, shared_memory=False))
    no_hard = closed(suite, sets=("mixed", "easy"))
    assert any("-easy-" in slug for slug in no_hard)
    assert not any("-hard-" in slug for slug in no_hard)
    assert not any("ensemble" in slug for slug in closed(suite, systems=SYSTEMS[:-1]))


def test_no_parameters_are_sent_over_http():
    with_threshold = [
        make_system(name, parameters={"threshold": 1} if name == "adaptive-0" else {})
        for name in NAMES
    ]
    over_http = [
        level
        for level in closed_levels(FULL, with_threshold, SETS, http=True, shared_memory=True)
        if level.protocol == "http"
    ]
    assert over_http and not any(level.system.parameters for level in over_http)


# --- saturated ---------------------------------------------------------------------------------

MEASURED = [
    make_measured("static-low", [30.0, 32.0], concurrency=1),
    make_measured("static-low", [60.0, 62.0, 61.0], concurrency=8),
    make_measured("static-low", [55.0], concurrency=4),
    make_measured("static-high", [18.0, 20.0], concurrency=8),
    make_measured("adaptive", [40.0], concurrency=8),
    make_measured("adaptive", [90.0], concurrency=16, set_name="easy"),
    make_measured("adaptive", [91.0], concurrency=16, protocol="http"),
    make_measured("adaptive", [92.0], concurrency=16, shared_memory="system"),
]


def test_saturated_is_the_highest_closed_loop_on_mixed_images_over_plain_grpc():
    found = saturated(MEASURED)
    assert set(found) == {"static-low", "static-high", "adaptive"}
    assert found["static-low"] is MEASURED[1]
    assert found["adaptive"] is MEASURED[4]


def test_its_throughput_is_the_median_of_the_turns():
    assert saturated_throughput(MEASURED) == {
        "static-low": 61.0,
        "static-high": 19.0,
        "adaptive": 40.0,
    }


# --- open loops --------------------------------------------------------------------------------


def test_images_arrive_at_parts_of_what_each_system_reached_itself():
    levels = open_levels(replace(FULL, rates=(0.5, 0.9)), SYSTEMS, MEASURED)
    assert [(level.system.name, level.rate_per_s) for level in levels] == [
        ("static-low", 30.5),
        ("static-high", 9.5),
        ("adaptive", 20.0),
        ("static-low", 54.9),
        ("static-high", 17.1),
        ("adaptive", 36.0),
    ]
    assert {(level.concurrency, level.set_name, level.protocol) for level in levels} == {
        (0, "mixed", "grpc")
    }


def test_the_quick_suite_sends_open_loops_to_the_adaptive_system_only():
    levels = open_levels(replace(QUICK, rates=(0.6,)), SYSTEMS, MEASURED)
    assert [level.system.name for level in levels] == ["adaptive"]
