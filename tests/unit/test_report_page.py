"""A page is written whole or not at all."""

import os
import resource

import jinja2
import pytest

from report import page
from report.page import render


@pytest.fixture
def templates(monkeypatch):
    """One template, `a`, which shows `words`."""
    loader = jinja2.DictLoader({"a": "<p>{{ words }}</p>"})
    found = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined)
    monkeypatch.setattr(page, "_environment", lambda: found)


def test_the_folder_is_made_and_nothing_lies_beside_the_page(templates, tmp_path):
    path = tmp_path / "new" / "page.html"
    for words in ("first", "second"):
        render(path, "a", words=words)
        assert path.read_text() == f"<p>{words}</p>"
        assert list(path.parent.iterdir()) == [path]


def test_a_name_that_is_not_given_is_an_error_and_makes_nothing(templates, tmp_path):
    with pytest.raises(jinja2.UndefinedError):
        render(tmp_path / "new" / "page.html", "a")
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_leaves_the_one_from_before(templates, tmp_path):
    path = tmp_path / "page.html"
    render(path, "a", words="before")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(OSError, match="too large"):  # in the middle, as with a full disk
            render(path, "a", words="x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_text() == "<p>before</p>"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_no_unicode_does_not_cost_the_page(templates, tmp_path):
    render(tmp_path / "page.html", "a", words=os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "page.html").read_text() == "<p>caf\\udce9</p>"
