"""What the planner has priced: all graphs together, asked about some of its images."""

from perf import prices
from planner.workshop import PRICED_IMAGES, WORKSHOP
from tests.unit.plan_workplace import QUIET, TwoColours, make_request, write_shelf


def test_graphs_are_priced_as_they_will_be_served_on_images_from_all_of_the_source(
    tmp_path, monkeypatch
):
    asked = []

    def price(graphs, names, pool, served, bars):
        asked.append((list(names), len(pool), served))
        assert bars is QUIET
        return {name: {} for name in names}

    monkeypatch.setattr(prices, "price", price)
    graphs = write_shelf(tmp_path / "graphs", ["px=4"])
    source = TwoColours(700, gone=[0])
    request = make_request(tmp_path, source=source, instances=3, threads=2)
    found = WORKSHOP.price(graphs, ["px4", "full"], request, QUIET)
    assert set(found) == {"px4", "full"}
    assert asked == [(["px4", "full"], PRICED_IMAGES - 1, prices.Served(3, 2))]
    assert (source.read[0], source.read[-1], len(source.read)) == (0, 699, PRICED_IMAGES)
