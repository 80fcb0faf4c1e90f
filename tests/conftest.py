"""What unit tests and tests with a server share: their order, the long files first.

xdist gives a file at a time to whichever process has nothing to do: one that takes long and comes
last keeps the others waiting.
"""

LONG = (
    # tests/unit
    "test_export_rungs",
    "test_export_recipes",
    "test_export_token_merging",
    "test_tasks",
    "test_plan_result",
    "test_calibration_fit",
    "test_client_processes",
    "test_report_calibration",
    "test_calibration_answers",
    "test_export_quantise",
    "test_router_audit",
    "test_export_align",
    "test_calibration_validity",
    "test_export_pretrained",
    "test_plan_validity",
    # tests/triton: test_server begins with what needs no build, while another process makes it
    "test_supervise",
    "test_server",
    "test_rollout",
    "test_router_operations",
    "test_perf_locust",
    "test_reference_answers",
    "test_signals",
    "test_observability",
    "test_production",
    "test_readme",
    "test_client",
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
