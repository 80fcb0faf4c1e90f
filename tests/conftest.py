"""What unit tests and tests with a server share: their order, the long files first.

xdist gives a file at a time to whichever process has nothing to do: one that takes long and comes
last keeps the others waiting.
"""

LONG = (
    # tests/unit
    "test_export_patch_sizes",
    "test_export_token_merging",
    "test_export_rungs",
    "test_tasks",
    "test_export_graphs",
    "test_client_processes",
    "test_export_align",
    "test_export_pretrained",
    "test_report_calibration",
    "test_plan_result",
    "test_export_precisions",
    "test_calibration_fit",
    "test_plan_cli",
    "test_calibration_cli",
    # tests/triton: test_server begins with what needs no build, while another process makes it
    "test_supervise",
    "test_server",
    "test_rollout",
    "test_router_operations",
    "test_perf_locust",
    "test_production",
    "test_reference_answers",
    "test_signals",
    "test_observability",
    "test_readme",
    "test_perf_prices",
    "test_client",
    "test_raw_http",
    "test_page",
    "test_refusals",
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
