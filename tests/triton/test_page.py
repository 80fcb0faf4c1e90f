"""The page to try a model, in a real Chromium, before a real server."""

import base64
import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from client import GrpcClient
from tests.servers import wait_for
from tests.tools import program

ROOT = Path(__file__).resolve().parents[2]
NARROW = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
# A file is put into the page as an operating system would: under a name, with a kind.
PUT = """
const [files, kind] = arguments;
const data = new DataTransfer();
for (const [name, base64] of files) {
  const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
  data.items.add(new File([bytes], name, { type: "image/jpeg" }));
}
const event = kind === "paste"
  ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
  : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
document.getElementById("drop").dispatchEvent(event);
"""


@pytest.fixture(scope="module")
def names(graph_set, tmp_path_factory):
    """A file of class names; one is markup."""
    file = tmp_path_factory.mktemp("names") / "labels.txt"
    lines = [f"<i>kind</i> {index}" for index in range(graph_set.classes)]
    file.write_text("\n".join(lines) + "\n")
    return file


@contextmanager
def shown(*options):
    """The command as a user types it; yields its address, once it prints it, and the process."""
    command = [sys.executable, "-m", "demo", "page", "--port", "0", *map(str, options)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        said = [process.stdout.readline(), process.stdout.readline()]
        assert said[1].startswith("Open http://127.0.0.1:"), said
        yield said[1].split()[1], process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        process.stdout.close()


@pytest.fixture(scope="module")
def page(server, names):
    options = ("--url", server.grpc_url, "--metrics-url", server.metrics_url, "--labels", names)
    with shown(*options) as (address, process):
        yield address
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0  # Ctrl-C is how it ends


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser that finds nothing but this machine."""
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium")
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server"),
        *("--disable-background-networking", "--disable-component-update", "--no-first-run"),
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(program("chromedriver"))
    with webdriver.Chrome(options, service) as driver:
        yield driver


@pytest.fixture
def tab(chromium, page):
    """The page, freshly loaded; afterwards it has complained of nothing and asked nobody else."""
    chromium.get_log("browser"), chromium.get_log("performance")
    chromium.get(page)
    yield chromium
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if "requestWillBeSent" == _name(e)]
    assert len(asked) >= 5  # the page, its files and its questions
    assert all(url.removeprefix("blob:").startswith(page) for url in asked), asked


def _name(event):
    return event["method"].removeprefix("Network.")


@pytest.fixture(scope="module")
def two(server, crops):
    """The place of a crop that stays cheap, and of one that escalates."""
    with GrpcClient(server.grpc_url) as client:
        escalated = [answer.escalated for answer in client.infer(crops)]
    return escalated.index(False), escalated.index(True)


def cards(tab, count):
    """The answers on the page, the latest first, once all of them are there."""

    def done():
        found = tab.find_elements(By.CSS_SELECTOR, ".card")
        states = [one.find_element(By.CSS_SELECTOR, ".state").is_displayed() for one in found]
        return len(found) == count and not any(states)

    assert wait_for(done)
    return tab.find_elements(By.CSS_SELECTOR, ".card")


def put(tab, files, kind="drop"):
    encoded = [(name, base64.b64encode(data).decode()) for name, data in files]
    tab.execute_script(PUT, encoded, kind)


def text(card, selector):
    return card.find_element(By.CSS_SELECTOR, selector).text


def middle(card, selector):
    box = card.find_element(By.CSS_SELECTOR, selector).rect
    return box["x"] + box["width"] / 2


def test_chosen_pictures_show_their_route_score_threshold_and_classes(
    tab, server, crops, two, calibration, tmp_path
):
    files = [tmp_path / name for name in ("kept.jpg", "hard.jpg")]
    for file, place in zip(files, two, strict=True):
        file.write_bytes(crops[place])
    tab.find_element(By.ID, "file").send_keys("\n".join(map(str, files)))
    hard, kept = cards(tab, 2)
    with GrpcClient(server.grpc_url) as client:
        answers = client.infer([crops[place] for place in two])
    for card, file, answer in zip((kept, hard), files, answers, strict=True):
        assert text(card, "h2") == file.name
        said = text(card, ".said")
        assert f"{answer.score:.4g}" in said and f"{calibration.threshold:.4g}" in said
        ((best, share), *_) = answer.top(5)
        first = card.find_elements(By.CSS_SELECTOR, ".found > .outputs li span")
        assert (first[0].text, first[-1].text) != ("", "")
        assert first[0].text == f"<i>kind</i> {best}"  # as text
        assert f"{100 * share:.1f} %" in text(card, ".found > .outputs")
        assert text(card, ".time").endswith(" ms")
        assert card.find_element(By.TAG_NAME, "img").get_property("naturalWidth") > 0
        is_left = middle(card, ".track .score") < middle(card, ".track .threshold")
        assert is_left == (not answer.escalated)
    assert text(kept, ".route") == "cheap rung"
    assert text(hard, ".route") == "escalated to the full rung"
    threshold = tab.find_element(By.ID, "server").text
    assert f"threshold {calibration.threshold:.4g}" in threshold and server.grpc_url in threshold


def test_dropped_and_pasted_pictures_are_answered_side_by_side_and_a_refused_one_has_one_line(
    tab, crops
):
    name = "<img src=x onerror=document.title='run'>.jpg"
    files = [(f"{number}.jpg", crops[number]) for number in range(6)]
    put(tab, [*files, (name, crops[6]), ("broken.jpg", b"no picture"), ("cut.jpg", crops[0][:600])])
    put(tab, [("image.png", crops[7])], "paste")
    found = cards(tab, 10)
    assert text(found[0], "h2") == "image.png" and text(found[3], "h2") == name
    assert tab.title == "Adaptive ViT: try it"
    for card in found:
        broken = text(card, "h2") in ("broken.jpg", "cut.jpg")
        assert card.find_element(By.CSS_SELECTOR, ".found").is_displayed() != broken
        line = text(card, ".words > .error")
        assert bool(line) == broken
    assert text(found[2], ".words > .error").startswith("not a JPEG")
    assert "damaged" in text(found[1], ".words > .error")
    put(tab, [])  # a link, or a piece of text
    assert "holds no picture" in text(tab, "#notice")


def test_the_keyboard_reaches_the_choice_and_the_full_rung_and_a_narrow_window_holds_it_all(
    tab, crops, two, server
):
    tab.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", NARROW)
    ActionChains(tab).send_keys(Keys.TAB).perform()
    assert tab.switch_to.active_element.get_attribute("id") == "file"
    put(tab, [("kept.jpg", crops[two[0]])])
    (card,) = cards(tab, 1)
    assert not card.find_element(By.CSS_SELECTOR, ".full").is_displayed()
    ActionChains(tab).send_keys(Keys.TAB, Keys.ENTER).perform()
    assert wait_for(lambda: card.find_element(By.CSS_SELECTOR, ".full").is_displayed())
    with GrpcClient(server.grpc_url) as client:
        low, high = (client.infer([crops[two[0]]], policy=p)[0].top(1) for p in ("low", "high"))
    assert text(card, ".full .outputs li .name") == f"<i>kind</i> {high[0][0]}"
    same = "the same" if low[0][0] == high[0][0] else "another"
    assert text(card, ".verdict") == f"It names {same} class."
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert tab.execute_script(wide) == 0
    tab.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_a_threshold_and_without_the_program_the_page_says_so(chromium, server, crops):
    with shown("--url", server.grpc_url) as (address, process):
        chromium.get(address)
        put(chromium, [("one.jpg", crops[0])])
        (card,) = cards(chromium, 1)
        assert "the threshold is not known here" in text(card, ".said")
        assert not card.find_element(By.CSS_SELECTOR, ".threshold").is_displayed()
        assert text(card, ".outputs li").startswith("class ")  # nobody named them
        process.send_signal(signal.SIGINT)
        process.wait(30)
        time.sleep(0.1)
        put(chromium, [("two.jpg", crops[1])])
        assert "start python -m demo page again" in text(cards(chromium, 2)[0], ".words > .error")
