"""What a PromQL expression names, read well enough for the expressions of this repository.

Prometheus says whether an expression parses, but takes any name, also one that nobody exports.
"""

import re

_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_WORDS = r"and|or|unless|bool|offset|by|without|on|ignoring|group_left|group_right|inf|nan"
_RANGE = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
_SELECTOR = re.compile(
    rf"(?<![\w:.])(?!(?:{_WORDS})\b)(?P<name>[a-zA-Z_:][\w:]*)\s*(?P<matchers>\{{[^}}]*\}})?(?!\s*\(|[\w:])",
    re.IGNORECASE,
)


def selectors(expression):
    """The series it reads, such as `up{job="a"}`; functions and grouping labels left out."""
    text = _RANGE.sub("", _GROUPING.sub(" ", expression))
    return {match["name"] + (match["matchers"] or "") for match in _SELECTOR.finditer(text)}


def metric(selector):
    """The name in a selector."""
    return selector.split("{")[0]


def grouping_labels(expression):
    """The labels that it groups or matches by."""
    found = set()
    for names in _GROUPING.findall(expression):
        found.update(name.strip() for name in names.split(",") if name.strip())
    return found
