"""Which versions of the router a repository serves, and which one answers.

Two files say so: `router/config.pbtxt` lists the versions to load and the one that only scores in
the shadow of the other; `adaptive_vit/config.pbtxt` names the one that answers. Here they are read
and changed, by the lines `export repository` wrote and nothing else of them.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from . import manifest

ROUTER_CONFIG = "router/config.pbtxt"
ENSEMBLE_CONFIG = "adaptive_vit/config.pbtxt"
_SERVED = r"(version_policy \{ specific \{ versions: \[ )([\d, ]*\d)( \] \} \})"
_LIVE = r'(model_name: "router"\n *model_version: )(\d+)()\b'
_PARAMETER = r'(key: "%s" value: \{ string_value: ")([^"]*)(")'


class VersionError(ValueError):
    """No such version, or configs that are not as they were assembled. One line."""


@dataclass(frozen=True)
class Versions:
    """What the two configs say.

    Attributes:
        live: the version that answers.
        served: versions that are loaded; a client can pin any of them.
        shadow: the version whose decisions are compared with the live ones; 0: none.
        shadow_fraction: share of the images that are compared.
    """

    live: int
    served: tuple[int, ...]
    shadow: int = 0
    shadow_fraction: float = 0.0

    @classmethod
    def load(cls, repository: Path) -> Versions:
        """Read them from an assembled repository.

        Raises:
            VersionError: a config is missing, or it is not as it was assembled.
        """
        router, ensemble = _read(repository, ROUTER_CONFIG), _read(repository, ENSEMBLE_CONFIG)
        return cls(
            live=int(_find(_LIVE, ensemble)),
            served=tuple(int(number) for number in _find(_SERVED, router).split(",")),
            shadow=int(_find(_PARAMETER % "shadow_version", router)),
            shadow_fraction=float(_find(_PARAMETER % "shadow_fraction", router)),
        )

    @property
    def sentence(self) -> str:
        """For people, in one line."""
        served = " and ".join(f"router/{number}" for number in sorted(self.served))
        share = f"{self.shadow_fraction:.0%} of the images"
        shadow = f"; router/{self.shadow} shadows {share}" if self.shadow else ""
        return f"router/{self.live} answers; {served} can be pinned{shadow}"

    def configs(self, repository: Path) -> dict[str, str]:
        """The text of both configs with these versions in them, by path in the repository."""
        router = _read(repository, ROUTER_CONFIG)
        router = _put(_SERVED, router, ", ".join(map(str, self.served)))
        router = with_parameter(router, "shadow_version", str(self.shadow))
        router = with_parameter(router, "shadow_fraction", f"{self.shadow_fraction:g}")
        ensemble = _put(_LIVE, _read(repository, ENSEMBLE_CONFIG), str(self.live))
        return {ROUTER_CONFIG: router, ENSEMBLE_CONFIG: ensemble}


def switch(repository: Path, version: int) -> Versions:
    """Let another version answer; the one that did stays loaded, and nothing is shadowed.

    Returns:
        What the configs say now.

    Raises:
        VersionError: there is no such version.
        ManifestError: the repository is not as it was assembled.
        OSError: a file cannot be written; the repository is as before.
    """
    before = Versions.load(repository)
    _check_is_there(repository, version)
    previous = {before.live} if version != before.live else set(before.served)
    after = Versions(version, tuple(sorted({version, *previous})))
    manifest.update(repository, after.configs(repository))
    return after


def drop(repository: Path, version: int) -> None:
    """Remove a version that does not answer.

    Raises:
        VersionError: there is no such version, or it is the one that answers.
        ManifestError: the repository is not as it was assembled.
        OSError: a file cannot be written or removed.
    """
    before = Versions.load(repository)
    _check_is_there(repository, version)
    if version == before.live:
        raise VersionError(f"version {version} is the one that answers; switch to another first")
    served = tuple(number for number in before.served if number != version)
    after = replace(before, served=served)
    if version == before.shadow:
        after = replace(after, shadow=0, shadow_fraction=0.0)
    folder = f"router/{version}"
    manifest.update(repository, after.configs(repository), removed=folder)
    shutil.rmtree(repository / folder)


def _check_is_there(repository: Path, version: int) -> None:
    there = present(repository)
    if version not in there:
        listed = ", ".join(map(str, there))
        raise VersionError(f"the router has no version {version}; in {repository}: {listed}")


def present(repository: Path) -> list[int]:
    """Numbers of the router's versions that the manifest lists, ascending."""
    parts = (Path(name).parts for name in manifest.listed(repository))
    return sorted({int(part[1]) for part in parts if part[0] == "router" and part[1].isdigit()})


def with_parameter(config: str, key: str, value: str) -> str:
    """The text of a `config.pbtxt` with another value of one parameter.

    Raises:
        VersionError: the parameter is not there once.
    """
    return _put(_PARAMETER % key, config, value)


def _read(repository: Path, name: str) -> str:
    try:
        return (repository / name).read_text()
    except OSError as error:
        raise VersionError(
            f"{repository / name}: {error.strerror}; assemble with python -m export repository"
        ) from None


def _find(pattern: str, config: str) -> str:
    found: list[tuple[str, str, str]] = re.findall(pattern, config)
    if len(found) != 1:
        raise VersionError(
            f"a config.pbtxt holds {pattern!r} {len(found)} times, not once; assemble again with "
            "python -m export repository"
        )
    return found[0][1]


def _put(pattern: str, config: str, value: str) -> str:
    _find(pattern, config)
    return re.sub(pattern, lambda match: match[1] + value + match[3], config)
