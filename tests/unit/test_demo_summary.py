import numpy as np
import pytest

from demo.summary import Pass, Served, cascade_bound, summarise


def served(adaptive, escalated):
    return Served(
        low=np.array([0, 1, 0, 3]),
        high=np.array([0, 1, 2, 3]),
        adaptive=np.array(adaptive),
        escalated=np.array(escalated),
        score=np.zeros(4, np.float32),
        truth=np.array([0, 1, 2, 2]),
    )


def passes(low, high, adaptive):
    systems = {"low": low, "high": high, "adaptive": adaptive}
    return {
        name: [Pass(40, 1000 / rate, rate) for rate in rates] for name, rates in systems.items()
    }


def test_bound_by_hand():
    # r = 4, a quarter escalates: a low pass for all (1/4) plus a high pass for a quarter (1/4).
    assert cascade_bound(4.0, 0.25) == 2.0
    assert cascade_bound(4.0, 0.0) == 4.0
    assert cascade_bound(4.0, 1.0) == 0.8


def test_figures_by_hand():
    summary = summarise(
        "tiny",
        (32, 64),
        served([0, 1, 2, 3], [False, False, True, False]),
        passes([40], [10], [18]),
        [(20.0, 21.0), (40.0, 44.0), (20.0, 90.0)],
        {"triton_version": "2.51.0", "cpu": "one"},
    )
    assert summary["escalation_rate"] == 0.25
    assert summary["agreement_with_high"] == 1.0
    assert summary["accuracy"] == {"low": 0.5, "high": 0.75, "adaptive": 0.75}
    assert summary["throughput_per_s"] == {"low": 40, "high": 10, "adaptive": 18}
    assert summary["speedup_vs_high"] == pytest.approx(1.8)
    assert summary["cascade_bound"] == pytest.approx(2.0)
    assert summary["cascade_efficiency"] == pytest.approx(0.9)
    assert summary["router_overhead"] == pytest.approx(1.1)
    assert summary["triton_version"] == "2.51.0" and summary["environment"] == {"cpu": "one"}


def test_throughput_is_all_requests_over_all_time():
    # 40 requests at 40/s take 1 s, 40 at 10/s take 4 s: 80 requests in 5 s.
    summary = summarise(
        "tiny",
        (32, 64),
        served([0, 1, 0, 3], [False] * 4),
        passes([40, 10], [10, 2.5], [40, 10]),
        [(1.0, 2.0)],
        {"triton_version": "x"},
    )
    assert summary["throughput_per_s"] == pytest.approx({"low": 16, "high": 4, "adaptive": 16})
    assert summary["latency_ms_p50"]["low"] == (25 + 100) / 2
    assert summary["cascade_efficiency"] == pytest.approx(1.0)
    assert summary["router_overhead"] == pytest.approx(2.0)
    assert summary["agreement_with_high"] == 0.75
