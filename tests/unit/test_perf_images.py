"""The pool and its easy, hard and mixed sets."""

from types import SimpleNamespace

import numpy as np
import pytest

from calibration.images import ImagesError
from imaging import Preprocessing, decode
from perf.figures import PerfError
from perf.images import (
    choose_sets,
    load_pool,
    read_pool,
    sent_under_load,
    spread_evenly,
)
from tests.unit.image_files import MemorySource, write_images

SMALL = Preprocessing(8, 8, None, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
GRAPHS = SimpleNamespace(preprocessing=SMALL.to_dict())


def pool_of(easy, hard):
    """BOOL (N,) with the hard ones at the end."""
    return np.arange(easy + hard) >= easy


# --- pool --------------------------------------------------------------------------------------


def test_a_pool_holds_each_image_as_bytes_and_as_tensor():
    source = MemorySource(6)
    done = []
    pool = read_pool(source, SMALL, lambda: done.append(1))
    assert len(done) == len(pool) == 6
    assert pool.title == "images in memory"
    assert pool.labels == [f"class {i % 5}" for i in range(6)]
    for row, data in enumerate(pool.encoded):
        assert data == source[row].data
        np.testing.assert_array_equal(pool.tensors[row], SMALL(decode(data)))
        assert pool.tensors[row].shape == (3, 8, 8)


def test_unreadable_images_are_left_out_by_name_and_the_rest_stays_aligned():
    source = MemorySource(6, broken=[1], gone=[4])
    done = []
    pool = read_pool(source, SMALL, lambda: done.append(1))
    assert len(done) == 6
    assert pool.labels == [f"class {i % 5}" for i in (0, 2, 3, 5)]
    assert pool.encoded == [source[i].data for i in (0, 2, 3, 5)]
    assert len(pool.tensors) == 4
    assert [line.partition(":")[0] for line in pool.unreadable] == ["1.png", "4.png"]


def test_a_name_that_is_no_text_stays_one_line():
    source = MemorySource(2, broken=[0])
    source.names = ("a\nb.png", "1.png")
    pool = read_pool(source, SMALL, lambda: None)
    assert pool.unreadable[0].startswith("a\\nb.png: ")


def test_a_pool_of_unreadable_images_is_refused_with_the_first_reason():
    with pytest.raises(PerfError, match=r"none of the 2 images can be read; first: 0\.png: "):
        read_pool(MemorySource(2, broken=[0, 1]), SMALL, lambda: None)


def test_sample_is_opened_with_its_seed_and_anything_else_is_a_folder(tmp_path):
    assert load_pool(GRAPHS, "sample", 2, 21).title == "sample crops, seed 21"
    write_images(tmp_path / "sample:3", *(f"{i}.png" for i in range(5)))
    assert len(load_pool(GRAPHS, str(tmp_path / "sample:3"), 3, 21)) == 3
    with pytest.raises(ImagesError, match="no such folder"):
        load_pool(GRAPHS, str(tmp_path / "nowhere"), 3)


# --- sets --------------------------------------------------------------------------------------


def test_each_set_has_the_escalation_it_is_named_for():
    escalated = pool_of(easy=60, hard=20)
    sets = choose_sets(escalated, mixed=40, shares=5, size=12)
    assert {name: len(rows) for name, rows in sets.items()} == {
        "mixed": 40,
        "easy": 12,
        "hard": 12,
    }
    assert escalated[sets["mixed"]].mean() == 0.25
    assert not escalated[sets["easy"]].any() and escalated[sets["hard"]].all()
    for rows in sets.values():
        assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(("easy", "hard"), [(8, 8), (7, 9), (39, 1), (1, 39), (4, 0), (0, 5)])
@pytest.mark.parametrize("mixed", [5, 6, 11, 1000])
def test_the_mixed_set_has_the_pools_own_rate_to_the_image(easy, hard, mixed):
    sets = choose_sets(pool_of(easy, hard), mixed, shares=1, size=3)
    size = min(mixed, easy + hard)
    assert len(set(sets["mixed"])) == len(sets["mixed"]) == size
    expected = size * hard / (easy + hard)
    found = pool_of(easy, hard)[sets["mixed"]].sum()
    # At least one, where there is one: a set of none would never ask the full rung.
    assert abs(found - expected) <= 0.5 or (found, hard > 0) == (pytest.approx(1), True)


@pytest.mark.parametrize(("easy", "hard", "in_each"), [(90, 10, 1), (80, 20, 2), (97, 4, 1)])
def test_every_share_of_the_mixed_set_has_equally_many_that_escalate(easy, hard, in_each):
    escalated = pool_of(easy, hard)
    rows = choose_sets(escalated, mixed=40, shares=4, size=8)["mixed"]
    shares = np.array_split(np.asarray(rows), 4)
    assert [int(escalated[share].sum()) for share in shares] == [in_each] * 4


@pytest.mark.parametrize(
    ("easy", "hard", "sent"), [(36, 4, 1), (39, 1, 1), (20, 20, 5), (40, 0, 0)]
)
def test_under_load_a_set_is_as_hard_as_the_whole(easy, hard, sent):
    escalated = pool_of(easy, hard)
    rows = sent_under_load(range(easy + hard), escalated, 10)
    assert len(set(rows)) == 10 and int(escalated[rows].sum()) == sent
    assert len(sent_under_load(range(6), escalated[:6], 10)) == 6


def test_the_choice_is_random_and_the_seed_repeats_it():
    escalated = pool_of(60, 20)
    first = choose_sets(escalated, 40, 5, 12)
    assert first == choose_sets(escalated, 40, 5, 12)
    assert first != choose_sets(escalated, 40, 5, 12, seed=1)
    assert sorted(first["easy"]) != list(range(12))  # not the first ones of the folder


def test_four_images_are_a_set_and_three_are_none():
    assert set(choose_sets(pool_of(4, 4), 40, 4, 12)) == {"mixed", "easy", "hard"}
    assert set(choose_sets(pool_of(20, 3), 40, 4, 12)) == {"mixed", "easy"}
    assert set(choose_sets(pool_of(3, 20), 40, 4, 12)) == {"mixed", "hard"}
    assert set(choose_sets(pool_of(20, 0), 40, 4, 12)) == {"mixed", "easy"}
    with pytest.raises(PerfError, match="3 images are too few to measure, 4 are needed"):
        choose_sets(pool_of(2, 1), 40, 1, 12)


@pytest.mark.parametrize(("many", "few"), [(9, 3), (10, 3), (5, 1), (3, 3), (2, 7), (0, 4), (4, 0)])
def test_both_kinds_are_spread_so_that_every_stretch_has_its_share(many, few):
    mixed = spread_evenly(list(range(many)), list(range(100, 100 + few)))
    assert sorted(mixed) == [*range(many), *range(100, 100 + few)]
    rate = few / len(mixed)
    for end in range(len(mixed) + 1):
        assert abs(sum(row >= 100 for row in mixed[:end]) - rate * end) <= 0.5 + 1e-9
