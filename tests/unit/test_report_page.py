"""A page is written whole or not at all."""

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
    with pytest.raises(UnicodeEncodeError):  # once the file is there, as with a full disk
        render(path, "a", words="x" * 100_000 + "\ud800")
    assert path.read_text() == "<p>before</p>"
    assert list(tmp_path.iterdir()) == [path]
