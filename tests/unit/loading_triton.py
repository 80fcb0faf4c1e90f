"""A stand-in of a server that loads models: it loads what a repository's files say."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.grpc.service_pb2 import ModelConfigResponse, RepositoryIndexResponse
from tritonclient.utils import InferenceServerException

import bundle.config
import server.access
import server.loading
from bundle import manifest
from bundle.versions import Versions
from export.repository import RepositorySettings, assemble
from export.versions import add_version
from server.rollout import RolloutError, rollout
from tests.unit.test_export_repository import write_inputs
from tests.unit.test_export_versions import change_artifact

ENSEMBLES = ("adaptive_vit", "adaptive_tensor")
TENSORS = ENSEMBLES[1]
BY_WAY_OF_BOTH = ["router", *ENSEMBLES, "router"]
BEFORE, AFTER = Versions(1, (1,), 2, 0.1), Versions(2, (2,))
OUTAGE = "StatusCode.UNAVAILABLE"
NOT_LOADED = (
    "load failed for model 'router': version 2 is at UNAVAILABLE state: Internal: RuntimeError: "
    "no such luck\n\nAt:\n  model.py(3): <module>\n"
)


class LoadingTriton:
    """A server of a repository: loads what its files say, as Triton does.

    `fault(number, name)` is called before and after each call, from 0, and may raise; `states` are
    the versions it went through, as (adaptive_vit's, adaptive_tensor's, the router's).
    """

    def __init__(self, repository, refusal=None):
        self.repository = repository
        self.served = Versions.load(repository)
        self.refusals = refusal or {}
        self.fault = lambda number, name, is_done: None
        self.number = -1
        self.calls = []
        self.headers = []
        self.states = []
        self.verdicts = {}
        self.asked = []
        self.goes_without = ()

    def open(self, url):
        self.url = url
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def _call(self, name, headers, effect):
        self.number += 1
        number = self.number
        self.headers.append(headers)
        self.fault(number, name, False)
        if name in self.refusals:
            raise self.refusals[name]
        answer = effect()
        self.fault(number, name, True)
        return answer

    def get_model_config(self, model, headers, client_timeout):
        return self._call("get_model_config", headers, lambda: self._config(model))

    def _config(self, model):
        answer = ModelConfigResponse()
        if model == "router":
            parameters = answer.config.parameters
            parameters["shadow_version"].string_value = str(self.served.shadow)
            parameters["shadow_fraction"].string_value = f"{self.served.shadow_fraction:g}"
            answer.config.input.add(name="image", dims=[3, 8, 8])
            return answer
        live = self.served.live if model == "adaptive_vit" else tensors(self.served)
        if not live:
            raise refusal(f"unknown model: '{model}'", "StatusCode.NOT_FOUND")
        steps = answer.config.ensemble_scheduling.step
        steps.add(model_name="preprocess", model_version=1)
        steps.add(model_name="router", model_version=live)
        return answer

    def get_model_repository_index(self, headers, client_timeout):
        def index():
            answer = RepositoryIndexResponse()
            answer.models.add(name="preprocess", version="1", state="READY")
            for version in range(1, 6):
                state = "READY" if version in self.served.served else "UNAVAILABLE"
                answer.models.add(name="router", version=str(version), state=state)
            return answer

        return self._call("get_model_repository_index", headers, index)

    def infer(self, model, inputs, model_version, request_id, client_timeout):
        """Answers as the next of the version's verdicts says, and as the last one from then on."""
        assert (model, inputs[0].shape()) == ("router", [1, 3, 8, 8])
        version = int(model_version)
        assert version in self.served.served
        self.asked.append((version, self.served.live, tensors(self.served)))
        verdicts = self.verdicts.get(version, [None])
        verdict = verdicts.pop(0) if len(verdicts) > 1 else verdicts[0]
        if isinstance(verdict, BaseException):
            raise verdict

    def load_model(self, model, headers, client_timeout):
        self.calls.append(model)
        self._call(model, headers, lambda: self._load(model))

    def _load(self, model):
        said, was = Versions.load(self.repository), self.served
        live = said.live if model == "adaptive_vit" else was.live
        named = tensors(said if model == "adaptive_tensor" else was)
        said = replace(said, live=live, tensors=None if named == live else named)
        # What it is made of comes with it; the other ensemble is gone where its version is.
        assert model == "router" or (live if model == "adaptive_vit" else named) in said.served
        assert said.named <= set(said.served) or model in self.goes_without, said
        manifest.verify(self.repository)  # as its router does
        self.served = said
        self.states.append((live, named, said.served))


def tensors(versions):
    """What adaptive_tensor names."""
    return versions.live if versions.tensors is None else versions.tensors


def refusal(text, status="StatusCode.INVALID_ARGUMENT"):
    return InferenceServerException(text, status=status)


def roll(repository, triton, to=None, timeout_s=120.0, headers=()):
    """A rollout to that server."""
    access = SimpleNamespace(
        url="127.0.0.1:8001",
        headers=dict(headers),
        open=lambda: triton,
        why_refused=lambda: None,
    )
    return rollout(repository, access, to, timeout_s)


def failure(repository, triton, *arguments, kind=RolloutError, **options):
    """The one line that a rollout fails with."""
    with pytest.raises(kind) as caught:
        roll(repository, triton, *arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lost():
    """An answer that did not come."""
    return refusal("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED")


def assembled_twice(folder):
    """Repositories `careful` and `any`: a version that answers and a shadow beside it."""
    inputs = write_inputs(folder)
    second = change_artifact(folder, "second", threshold=0.75)
    for kind in ("careful", "any"):
        out = assemble(*inputs, folder / kind, RepositorySettings(client_parameters=kind))
        add_version(out, second, shadow_fraction=0.1)
    return folder


def without_pauses(monkeypatch):
    """Rollouts that wait for nobody, and parse each text of a configuration once."""
    monkeypatch.setattr(server.loading, "_POLL_S", 0.001)
    monkeypatch.setattr(server.access, "_POLL_S", 0.001)

    def parse(text, message):
        message.CopyFrom(_parsed(text))
        return message

    monkeypatch.setattr(bundle.config.text_format, "Parse", parse)


_PARSE = text_format.Parse


@cache
def _parsed(text):
    return _PARSE(text, ModelConfig())
