"""Which versions of the router a repository serves, and which one answers.

`router/config.pbtxt` lists the versions to load and the one that only scores in the shadow of the
other; the configurations of the ensembles, `adaptive_vit` for encoded images and `adaptive_tensor`
for tensors, name the one that answers. The manifest repeats that one's number for the router, which
reads no other model's configuration.

Triton gives a request to `router` itself that pins no version the highest one that is loaded. So
none above the one that answers is: a candidate lies on disk, where the one that answers can read
its artifact as a shadow's, and is loaded when it is to answer. Lower ones stay loaded, for clients
that pin them, only where clients may leave the certificate anyway: pinning a former version with a
higher threshold would be a way around `client_parameters: careful`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelEnsembling

from bundle import config, manifest
from bundle.config import ConfigError
from routing import journal

ROUTER_CONFIG = "router/config.pbtxt"
ENSEMBLE_CONFIG = "adaptive_vit/config.pbtxt"
TENSORS_CONFIG = "adaptive_tensor/config.pbtxt"


class VersionError(ConfigError):
    """No such version, or configs that are not as they were assembled. One line."""


@dataclass(frozen=True)
class Versions:
    """What the configs say.

    Attributes:
        live: the version that answers, by `adaptive_vit`.
        served: versions that are loaded; a client can pin any of them. The one that answers is
            the highest, but for the moments of a switch back.
        shadow: the version whose decisions are compared with the live ones; 0: none.
        shadow_fraction: share of the images that are compared.
        tensors: what `adaptive_tensor` names where it is not `live`: another version, in the
            moments of a switch, or 0 where there is no such model, as an earlier release assembled
            it; None: `live`.
    """

    live: int
    served: tuple[int, ...]
    shadow: int = 0
    shadow_fraction: float = 0.0
    tensors: int | None = None

    @classmethod
    def load(cls, repository: Path) -> Versions:
        """Read them from an assembled repository.

        Raises:
            VersionError: a config is missing, or it is not as it was assembled.
        """
        with _as_assembled(repository):
            router = config.read(repository / ROUTER_CONFIG)
            live, tensors = _answering(repository, ENSEMBLE_CONFIG)[1].model_version, 0
            if (repository / TENSORS_CONFIG).exists():
                tensors = _answering(repository, TENSORS_CONFIG)[1].model_version
            return cls(
                live=live,
                served=_served(router),
                shadow=int(config.parameter(router, "shadow_version")),
                shadow_fraction=float(config.parameter(router, "shadow_fraction")),
                tensors=None if tensors == live else tensors,
            )

    @property
    def named(self) -> set[int]:
        """The versions that the ensembles name: one, or two in the moments of a switch."""
        return {self.live, self.tensors or self.live} - {0}

    @property
    def sentence(self) -> str:
        """For people, in one line."""
        others = " and ".join(f"router/{number}" for number in self.served if number != self.live)
        pinned = f"; {others} can be pinned too" if others else ""
        share = f"{self.shadow_fraction:.0%} of the images"
        shadow = f"; router/{self.shadow} shadows {share}" if self.shadow else ""
        tensors = {None: "", 0: ", without adaptive_tensor"}.get(
            self.tensors, f", and router/{self.tensors} tensors"
        )
        return f"router/{self.live} answers{tensors}{pinned}{shadow}"

    @property
    def warning(self) -> str:
        """What is wrong with them and what to do, in one line; empty where nothing is."""
        if not self.fault:
            return ""
        return (
            f"{self.fault}; run python -m server rollout, or python -m export versions --live "
            f"{self.live} and start again"
        )

    @property
    def fault(self) -> str:
        """The warning without what to do."""
        if self.tensors:
            return (
                f"adaptive_tensor is answered by router/{self.tensors} and adaptive_vit by router/"
                f"{self.live}, as an interrupted rollout left it"
            )
        higher = " and ".join(f"router/{number}" for number in self.served if number > self.live)
        if not higher:
            return ""
        return (
            f"{higher} is loaded above router/{self.live}, so it answers requests to the router "
            "that pin no version, as an earlier release or an interrupted rollout left it"
        )

    def settled(self, careful: bool) -> Versions:
        """With none loaded that should not be, by the rule in the module's text.

        Args:
            careful: whether requests may only make routing more careful.
        """
        kept = (number for number in self.served if number < self.live and not careful)
        served = tuple(sorted({self.live, *kept}))
        return replace(self, served=served, tensors=0 if self.tensors == 0 else None)

    def beside(self, former: Iterable[int]) -> Versions:
        """With versions loaded that answered before: on the way, as long as both are needed."""
        return replace(self, served=tuple(sorted({*self.served, *former})))

    def configs(self, repository: Path) -> dict[str, str]:
        """The text of the configs with these versions in them, by path in the repository.

        Raises:
            VersionError: a config is missing, or it is not as it was assembled.
        """
        with _as_assembled(repository):
            router = config.read(repository / ROUTER_CONFIG)
            _served(router)
            router.version_policy.specific.versions[:] = self.served
            config.set_parameter(router, "shadow_version", str(self.shadow))
            config.set_parameter(router, "shadow_fraction", f"{self.shadow_fraction:g}")
            texts = {ROUTER_CONFIG: config.text(router)}
            tensors = self.live if self.tensors is None else self.tensors
            for name, version in ((ENSEMBLE_CONFIG, self.live), (TENSORS_CONFIG, tensors)):
                if version:
                    ensemble, step = _answering(repository, name)
                    step.model_version = version
                    texts[name] = config.text(ensemble)
            return texts


def switch(repository: Path, version: int) -> Versions:
    """Let another version answer, in an assembled repository that nobody serves; end the shadow.

    The one that answered stays loaded if it is a lower one and requests may pin it.

    Returns:
        What the configs say now.

    Raises:
        VersionError: there is no such version.
        ManifestError: the repository is not as it was assembled.
        OSError: a file cannot be written; the repository is as before.
    """
    after = switched(repository, version)
    put(repository, after)
    return after


def switched(repository: Path, version: int) -> Versions:
    """What a repository is to say once a version answers instead.

    Raises:
        VersionError: there is no such version.
    """
    before = Versions.load(repository)
    _check_is_there(repository, version)
    former = {before.live} if version != before.live else set(before.served)
    after = replace(before, live=version, served=tuple(former), shadow=0, shadow_fraction=0.0)
    return after.settled(is_careful(repository))


def put(repository: Path, versions: Versions) -> None:
    """Let the configs say so. Between any two steps they name a version that is loaded, too.

    Raises:
        VersionError: the configs are not as they were assembled.
        ManifestError: the repository is not as it was assembled.
        OSError: a file cannot be written.
    """
    now = Versions.load(repository)
    if not now.named <= set(versions.served):  # the router's config is replaced before the others
        manifest.update(repository, versions.beside(now.named).configs(repository))
    manifest.update(repository, versions.configs(repository), live=versions.live)


def is_careful(repository: Path) -> bool:
    """Whether requests to its router may only make routing more careful.

    Raises:
        VersionError: a config is missing, or it is not as it was assembled.
    """
    return _router_parameter(repository, "client_parameters") != "any"


def refuses_other_answers(repository: Path) -> bool:
    """Whether its router answers nobody before its answers have been found to be as calibrated.

    A repository that is none of ours, or of a release before there was such a router, has none.
    """
    with suppress(VersionError):
        return _router_parameter(repository, "reference_check") == "refuse"
    return False


def live_folder(repository: Path) -> Path:
    """Where a router that live traffic certifies writes its evidence.

    Raises:
        VersionError: a config is missing, or it is not as it was assembled.
    """
    return journal.live_folder(repository, _router_parameter(repository, "live_folder"))


def drop(repository: Path, version: int) -> None:
    """Remove a version that does not answer.

    Raises:
        VersionError: there is no such version, or it is the one that answers.
        ManifestError: the repository is not as it was assembled.
        OSError: a file cannot be written or removed.
    """
    before = Versions.load(repository)
    _check_is_there(repository, version)
    if version in before.named:
        raise VersionError(f"version {version} is the one that answers; switch to another first")
    served = tuple(number for number in before.served if number != version)
    after = replace(before, served=served)
    if version == before.shadow:
        after = replace(after, shadow=0, shadow_fraction=0.0)
    manifest.update(repository, after.configs(repository), removed=f"router/{version}")


def _check_is_there(repository: Path, version: int) -> None:
    there = present(repository)
    if version not in there:
        listed = ", ".join(map(str, there))
        raise VersionError(f"the router has no version {version}; in {repository}: {listed}")


def present(repository: Path) -> list[int]:
    """Numbers of the router's versions that the manifest lists, ascending."""
    parts = (Path(name).parts for name in manifest.listed(repository))
    return sorted({int(part[1]) for part in parts if part[0] == "router" and part[1].isdigit()})


def _router_parameter(repository: Path, key: str) -> str:
    with _as_assembled(repository):
        return config.parameter(config.read(repository / ROUTER_CONFIG), key)


def _served(router: ModelConfig) -> tuple[int, ...]:
    """The versions that a router's config names; ConfigError where it leaves them to Triton."""
    if not router.version_policy.specific.versions:
        raise ConfigError(
            f"{ROUTER_CONFIG} does not name the versions to load; assemble again with python -m "
            "export repository"
        )
    return tuple(router.version_policy.specific.versions)


def _answering(repository: Path, name: str) -> tuple[ModelConfig, ModelEnsembling.Step]:
    """An ensemble and its step that asks the router; ConfigError where there is not exactly one."""
    ensemble = config.read(repository / name)
    found = [step for step in ensemble.ensemble_scheduling.step if step.model_name == "router"]
    if len(found) == 1 and found[0].model_version < 1:
        raise ConfigError(
            f"{name} does not name the version of the router that answers; assemble "
            "again with python -m export repository"
        )
    if len(found) != 1:
        raise ConfigError(
            f"{name} asks the router in {len(found)} steps, not in one; assemble again "
            "with python -m export repository"
        )
    return ensemble, found[0]


@contextmanager
def _as_assembled(repository: Path) -> Iterator[None]:
    """What is wrong with a config, as a `VersionError`."""
    try:
        yield
    except ValueError as error:  # a ConfigError, or a parameter that is no number
        words = str(error)
        if not isinstance(error, ConfigError):
            words = f"{repository}: {words}; assemble again with python -m export repository"
        raise VersionError(words) from None
