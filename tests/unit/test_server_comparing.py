"""Waiting for a router that refuses until it has compared its answers; the server is a fake."""

from pathlib import Path
from typing import Any

import pytest
from tritonclient.utils import InferenceServerException

from routing.reference import COMPARING, OTHER, VERDICTS
from server import access, launcher
from server.errors import ServerStartError

UNAVAILABLE = "StatusCode.UNAVAILABLE"
STILL = InferenceServerException(f"in ensemble 'adaptive_vit', {COMPARING}", UNAVAILABLE)
FOREIGN = InferenceServerException(f"{VERDICTS[OTHER]}: of 32 reference images 20", UNAVAILABLE)
FULL = InferenceServerException("Exceeds maximum queue size", UNAVAILABLE)


class FakeTriton:
    """Answers as the next verdict says, and as the last one from then on; its own access, too."""

    def __init__(self, *verdicts: BaseException | None) -> None:
        self.verdicts = list(verdicts)
        self.asked = 0

    def open(self) -> "FakeTriton":
        return self

    def __enter__(self) -> "FakeTriton":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def infer(self, model: str, inputs: list[object], **options: object) -> None:
        self.asked += 1
        verdict = self.verdicts.pop(0) if len(self.verdicts) > 1 else self.verdicts[0]
        if verdict is not None:
            raise verdict


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_POLL_S", 0.001)


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Wait for the first answer of a server."""

    def ask(triton: FakeTriton, refuses: bool = True, timeout_s: float = 60.0) -> None:
        class Started(launcher.TritonServer):
            access = triton

        monkeypatch.setattr(launcher, "refuses_other_answers", lambda repository: refuses)
        Started(tmp_path, log=tmp_path / "log", timeout_s=timeout_s)._wait_for_first_answer()

    return ask


def test_ready_means_that_every_instance_has_compared(ask: Any) -> None:
    # Two instances take turns; the second knows later.
    triton = FakeTriton(STILL, STILL, None, STILL, None, STILL, None)
    ask(triton)
    assert triton.asked == 6 + access.ANSWERS


@pytest.mark.parametrize("verdict", [None, FULL])
def test_a_router_that_does_not_refuse_is_asked_once(
    ask: Any, verdict: InferenceServerException | None
) -> None:
    triton = FakeTriton(verdict)
    ask(triton, refuses=False)
    assert triton.asked == 1


@pytest.mark.parametrize("timeout_s", [0.05, 0.3])
def test_comparing_may_take_as_long_as_was_asked_for(ask: Any, timeout_s: float) -> None:
    with pytest.raises(ServerStartError) as caught:
        ask(FakeTriton(STILL), timeout_s=timeout_s)
    assert f"(after {timeout_s:g} s; --timeout-s gives it longer)" in str(caught.value)


def test_a_router_that_refuses_for_good_says_the_way_out(ask: Any) -> None:
    with pytest.raises(ServerStartError, match="32 reference .* --reference-check warn and serve"):
        ask(FakeTriton(STILL, FOREIGN))
