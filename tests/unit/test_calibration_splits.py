from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.splits import ABOUND, SplitError, group_keys, shares_of, split_by_group
from tests.unit.calibration_outputs import make_outputs

SHARES = {"fit": 0.4, "certify": 0.4, "test": 0.2}


@pytest.fixture
def outputs(graph_set):
    return make_outputs(graph_set, n=60)


@given(st.integers(0, 1000), st.sampled_from([1, 2, 5]))
def test_splits_are_disjoint_complete_and_never_divide_a_group(seed, size):
    groups = tuple(str(i // size) for i in range(60 * size))
    groups = tuple(groups[i] for i in np.random.default_rng(seed).permutation(60 * size))
    for shares in (SHARES, shares_of(groups), shares_of(groups, certified=False)):
        splits = split_by_group(groups, shares, seed)
        assert sorted(np.concatenate(list(splits.values()))) == list(range(60 * size))
        seen = [{groups[row] for row in rows} for rows in splits.values()]
        assert sum(map(len, seen)) == len(set().union(*seen))


def test_splits_have_their_shares_and_follow_the_seed():
    groups = tuple(map(str, range(1000)))
    splits = split_by_group(groups, SHARES, 0)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "fit": 400,
        "certify": 400,
        "test": 200,
    }
    again, other = split_by_group(groups, SHARES, 0), split_by_group(groups, SHARES, 1)
    np.testing.assert_array_equal(splits["fit"], again["fit"])
    assert set(splits["fit"]) != set(other["fit"])


@pytest.mark.parametrize(
    ("groups", "certified", "test", "shares"),
    [
        (ABOUND - 1, True, None, {"fit": 0.35, "certify": 0.65}),
        (ABOUND, True, None, {"fit": 0.28, "certify": 0.52, "test": 0.2}),
        (ABOUND, True, 0.0, {"fit": 0.35, "certify": 0.65}),
        (100, True, 0.4, {"fit": 0.21, "certify": 0.39, "test": 0.4}),
        (ABOUND, False, None, {"fit": 0.7, "test": 0.3}),
        (100, False, 0.5, {"fit": 0.5, "test": 0.5}),
        (100, False, 0.0, {"fit": 1.0}),
    ],
)
def test_a_test_split_is_made_where_groups_abound_or_it_is_asked_for(
    groups, certified, test, shares
):
    keys = [str(i) for i in range(groups) for _ in range(2)]  # two images each
    found = shares_of(keys, certified, test)
    assert found == pytest.approx(shares) and list(found) == list(shares)
    assert sum(found.values()) == pytest.approx(1)


def test_too_few_groups_are_an_error():
    with pytest.raises(SplitError, match="2 groups are too few: split 'fit' gets 1"):
        split_by_group(("a",) * 30 + ("b",) * 30, SHARES, 0)


def test_groups_can_be_the_source_the_folder_or_the_content(outputs):
    assert group_keys(outputs, "source") == outputs.groups
    assert group_keys(outputs, "folder")[:3] == ("0", "0", "1")
    assert group_keys(outputs, "content") == outputs.hashes
    with pytest.raises(SplitError, match="--group-by 'colour' is none of source"):
        group_keys(outputs, "colour")


def test_groups_that_must_come_first_all_do_and_the_shares_stay():
    groups = tuple(str(i // 2) for i in range(1000))
    first = {str(i) for i in range(100, 250)}
    plain = split_by_group(groups, SHARES, 0)
    splits = split_by_group(groups, SHARES, 0, first)
    assert {name: len(rows) for name, rows in splits.items()} == {
        name: len(rows) for name, rows in plain.items()
    }
    assert first <= {groups[row] for row in splits["fit"]}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1000))
    many = {str(i) for i in range(300)}  # more than the share of the first split
    assert {groups[row] for row in split_by_group(groups, SHARES, 0, many)["fit"]} == many


@pytest.mark.parametrize("grouping", ["source", "folder", "content"])
def test_equal_pixels_under_two_names_are_of_one_group(outputs, grouping):
    copied = replace(outputs, hashes=("ab" * 32, *outputs.hashes[1:59], "ab" * 32))
    groups = np.array(group_keys(copied, grouping))
    assert groups[0] == groups[59]
    before = np.array(group_keys(outputs, grouping))
    assert before[0] != before[59] and len(set(groups)) == len(set(before)) - 1
    for rows in split_by_group(tuple(groups), SHARES, 0).values():
        assert len({0, 59} & set(rows)) != 1
