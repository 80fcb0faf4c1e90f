"""The systems in turn on a real server: its CPU time, and saturated on the same cores."""

import os

import pytest

from perf.cpu import on_same_cores
from perf.harness import ONE_BY_ONE, Asker, Load, take_turns
from perf.images import load_pool
from perf.systems import systems
from perf.target import Target

pytestmark = pytest.mark.alone
COUNT = 12


@pytest.fixture(scope="module")
def pool(graph_set):
    return load_pool(graph_set, "sample", COUNT)


@pytest.fixture(scope="module")
def target(server):
    with Target(server.grpc_url, server.http_url, server) as found:
        yield found


@pytest.fixture(scope="module")
def compared(graph_set, calibration, target):
    every = systems(graph_set, target.models, calibration.threshold, 0.0)
    names = ("static-low", "static-high", "adaptive-0", "adaptive")
    return [system for system in every if system.name in names]


def test_the_servers_cpu_time_belongs_to_the_system_that_was_asked(target, pool, compared):
    assert target.cpu_threads() == 1
    asker = Asker(target, pool, True, target.meter())
    found = take_turns(asker, compared, [range(COUNT)], ONE_BY_ONE, lambda: None)
    cpu_ms = {system.name: found.cpu_cost(system.name).median for system in compared}
    # The full rung has four times the cheap one's patches, and no neighbour changes that much.
    assert cpu_ms["static-high"] > 1.5 * cpu_ms["static-low"] > 0
    assert cpu_ms["adaptive-0"] > cpu_ms["static-low"]
    assert found.cpu_speedup().median == pytest.approx(cpu_ms["static-high"] / cpu_ms["adaptive"])
    assert cpu_ms["adaptive-0"] < cpu_ms["static-high"]


def test_saturated_spans_answer_as_requests_do_and_the_cores_are_given_back(
    server, target, pool, compared
):
    asker, cores = Asker(target, pool, True, target.meter()), os.sched_getaffinity(0)
    ids = server.process_ids()
    with on_same_cores(ids, 1) as count:
        assert count == 1 or len(cores) == 1
        if len(cores) > 1:
            allowed = {core for pid in ids for core in os.sched_getaffinity(pid)}
            assert len(allowed) == 1
        load = Load(in_flight=4, block=None)
        found = take_turns(asker, compared, [range(COUNT)] * 2, load, lambda: None, warm_up=8)
    assert all(os.sched_getaffinity(pid) == cores for pid in [os.getpid(), *ids])
    alone = take_turns(asker, compared, [range(COUNT)], ONE_BY_ONE, lambda: None)
    for system in compared:
        costs = [found.cost(system.name).values, found.cpu_cost(system.name).values]
        assert all(len(values) == 2 and min(values) > 0 for values in costs)
        together = [answer.escalated for answer in found.shares[0][system.name]]
        assert together == [answer.escalated for answer in alone.shares[0][system.name]]
    # By CPU time on both sides: what else runs on this machine takes none of the server's.
    low, high, adaptive = (
        found.cpu_cost(name).median for name in ("static-low", "static-high", "adaptive")
    )
    assert adaptive > (low + found.escalation_rate("adaptive") * high) / 1.5
