"""Waiting for a router that refuses until it has compared its answers; the server is a fake."""

from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from routing.reference import COMPARING, OTHER, VERDICTS
from server import comparing
from server.errors import ServerStartError
from server.readiness import adaptive_vit_canary
from server.startup import Startup

UNAVAILABLE = "StatusCode.UNAVAILABLE"
STILL = InferenceServerException(f"in ensemble 'adaptive_vit', {COMPARING}", UNAVAILABLE)
FOREIGN = InferenceServerException(f"{VERDICTS[OTHER]}: of 32 reference images 20", UNAVAILABLE)


class FakeTriton:
    """Answers as the next verdict says, and as the last one from then on; a channel, too."""

    def __init__(self, *verdicts: BaseException | None) -> None:
        self.verdicts = list(verdicts)
        self.asked = 0

    def open(self, url: str) -> "FakeTriton":
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
    monkeypatch.setattr(comparing, "_POLL_S", 0.001)


def ask(triton: FakeTriton, tmp_path: Path, compares: bool = True, timeout_s: float = 60.0) -> None:
    startup = Startup(
        None,  # type: ignore[arg-type]
        "id",
        ["adaptive_vit"],
        "127.0.0.1:8001",
        triton,  # type: ignore[arg-type]
        tmp_path / "log",
        lambda line: None,
    )
    startup.ask(None, timeout_s, compares)


def test_ready_means_that_every_instance_has_compared(tmp_path: Path) -> None:
    # Two instances take turns; the second knows later.
    triton = FakeTriton(STILL, STILL, None, STILL, None, STILL, None)
    ask(triton, tmp_path)
    assert triton.asked == 6 + comparing.ANSWERS


def test_a_router_that_does_not_refuse_is_asked_once(tmp_path: Path) -> None:
    triton = FakeTriton(None)
    ask(triton, tmp_path, compares=False)
    adaptive_vit_canary("", triton)  # type: ignore[arg-type]
    assert triton.asked == 2


@pytest.mark.parametrize("timeout_s", [0.05, 0.3])
def test_comparing_may_take_as_long_as_was_asked_for(tmp_path: Path, timeout_s: float) -> None:
    with pytest.raises(ServerStartError) as caught:
        ask(FakeTriton(STILL), tmp_path, timeout_s=timeout_s)
    assert f"(after {timeout_s:g} s; --timeout-s gives it longer)" in str(caught.value)


def test_a_router_that_refuses_for_good_says_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ServerStartError, match="32 reference .* --reference-check warn and serve"):
        ask(FakeTriton(STILL, FOREIGN), tmp_path)
