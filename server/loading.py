"""A running server that loads models: what it serves, and what it is told to load."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from bundle.versions import Versions
from routing import PROBE_ID

from .access import (
    ANSWERS,
    ENTRY,
    OTHER_ANSWERS,
    ROUTER,
    STILL_COMPARING,
    TENSORS,
    WAY_OUT,
    Access,
    rest,
    wait_out,
    zeros_input,
)
from .triton_log import first_line

_QUESTION_TIMEOUT_S = 5.0
_POLL_S = 0.1
# Triton has loaded when it says so; longer only for answers that come late.
_SHOW_S = 15.0
# These do not tell whether the server has done what it was told.
_LOST = ("CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNKNOWN")


class StepError(Exception):
    """A step failed; why, in one line."""


class RefusalError(StepError):
    """A version is loaded, and refuses every request or is still to find out whether it will."""


class NoAnswerError(Exception):
    """The server does not say what it serves; why not, in one line."""


class LoadingServer:
    """A server that was started with `--allow-reload`.

    Attributes:
        url: `host:port`.
        is_touched: whether it may have loaded anything since.
        silence: why it did not answer, where it did not.
        refusing: the version of the router that was last seen to refuse requests; 0: none.
    """

    def __init__(
        self, client: triton.InferenceServerClient, access: Access, timeout_s: float
    ) -> None:
        self._client = client
        self._headers = dict(access.headers)
        self._timeout_s = timeout_s
        self.url = access.url
        self.is_touched = False
        self.silence = ""
        self.refusing = 0

    def answering(self) -> Versions:
        """Which versions of the router the ensembles name, and nothing else.

        Returns:
            `live` and `tensors`; 0 where there is no such ensemble.

        Raises:
            NoAnswerError: it does not say.
        """
        live, tensors = (self._named_by(ensemble) for ensemble in (ENTRY, TENSORS))
        return Versions(live, (), tensors=None if tensors == live else tensors)

    def look(self, patience_s: float, wanted: Versions | None = None) -> Versions | None:
        """What it serves, asked until it says so; None: it does not, see `silence`.

        Args:
            patience_s: seconds to ask again, for no longer than the timeout.
            wanted: what it is to say, for which it is asked again, too.
        """
        deadline = time.monotonic() + min(patience_s, self._timeout_s)
        while True:
            seen = None
            try:
                seen = self._serves()
            except NoAnswerError as error:
                self.silence = str(error)
            if (seen is not None and wanted in (None, seen)) or time.monotonic() >= deadline:
                return seen
            deadline = rest(_POLL_S, deadline)

    def load(self, model: str) -> None:
        """Load a model as the disk has it, and what it is made of; wait until that is done.

        Raises:
            StepError: it refused, or did not answer.
        """
        was_touched, self.is_touched = self.is_touched, True
        try:
            self._client.load_model(model, headers=self._headers, client_timeout=self._timeout_s)
        except InferenceServerException as error:
            reason, what = first_line(error.message()), ""
            self.is_touched = was_touched
            if "restricted" in reason:
                what = "wants the admin key for this; give --admin-key-file"
            elif "explicit model load" in reason:
                what = "loads no models while it serves; start it with --allow-reload, or restart "
                what += "it to serve what the repository says"
            elif str(error.status()).removeprefix("StatusCode.") in _LOST:
                self.is_touched = True
                what = f"did not answer while it was to load {model}: {reason}"
            said = (
                f"the server at {self.url} {what}" if what else f"{model} was not loaded: {reason}"
            )
            raise StepError(said) from error

    def wait_for_answers(self, version: int) -> None:
        """Wait until a router that refuses other answers than calibrated has found none to refuse.

        What else a request may fail with, a rung that is away or a full queue, is not its refusal;
        nor is it one that comes late, for it refuses at once.

        Raises:
            RefusalError: it refuses for good, or does not know yet when the time has run out.
            StepError: the server does not say what it serves.
        """
        self.refusing = version
        try:
            config = self._config(ROUTER)
        except NoAnswerError as error:
            raise self._does_not_say(error) from error
        image = zeros_input([1, *config.input[0].dims] if config is not None else [1])

        def ask() -> None:
            try:
                self._client.infer(
                    ROUTER,
                    [image],
                    model_version=str(version),
                    request_id=PROBE_ID,
                    client_timeout=_QUESTION_TIMEOUT_S,
                )
            except InferenceServerException as error:
                if STILL_COMPARING in error.message() or OTHER_ANSWERS in error.message():
                    raise

        try:
            wait_out(ask, ANSWERS, self._timeout_s)
        except InferenceServerException as error:
            why = (
                f"refuses every request: {first_line(error.message())}; {WAY_OUT}"
                if OTHER_ANSWERS in error.message()
                else "is still comparing its answers with the calibration's after "
                f"{self._timeout_s:g} s; give it longer with --timeout-s"
            )
            raise RefusalError(f"router/{version} {why}") from error
        self.refusing = 0

    def wait_until(self, versions: Versions) -> None:
        """Wait until it serves just these.

        Raises:
            StepError: it does not, or does not say.
        """
        seen = self.look(_SHOW_S, versions)
        if seen is None:
            raise self._does_not_say(self.silence)
        if seen != versions:
            raise StepError(
                f"the server at {self.url} loaded its models, but they are not those of this "
                "repository; give the --repository that it serves"
            )

    def _does_not_say(self, why: object) -> StepError:
        self.silence = str(why)
        return StepError(
            f"the server at {self.url} was told to load, and does not say what it serves: {why}"
        )

    def _serves(self) -> Versions:
        answering, config = self.answering(), self._config(ROUTER)
        if config is None:
            return answering
        index = self._ask(self._client.get_model_repository_index)
        ready = {int(m.version) for m in index.models if (m.name, m.state) == (ROUTER, "READY")}
        return replace(
            answering,
            served=tuple(sorted(ready)),
            shadow=int(config.parameters["shadow_version"].string_value or 0),
            shadow_fraction=float(config.parameters["shadow_fraction"].string_value or 0.0),
        )

    def _named_by(self, ensemble: str) -> int:
        config = self._config(ensemble)
        steps = [] if config is None else config.ensemble_scheduling.step
        return next((int(step.model_version) for step in steps if step.model_name == ROUTER), 0)

    def _config(self, model: str) -> Any:
        """A model's configuration, None where there is no such model."""
        answer = self._ask(self._client.get_model_config, model)
        return None if answer is None else answer.config

    def _ask(self, call: Callable[..., Any], *arguments: str) -> Any:
        """Ask about what may not be there: None then."""
        options = {"headers": self._headers, "client_timeout": _QUESTION_TIMEOUT_S}
        try:
            return call(*arguments, **options)
        except InferenceServerException as error:
            if error.status() == "StatusCode.NOT_FOUND":
                return None
            raise NoAnswerError(first_line(error.message())) from error
