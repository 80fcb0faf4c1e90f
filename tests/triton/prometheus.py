"""A real Prometheus for one test module: the committed files, another target and address."""

import json
import os
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import yaml

from server.ports import pick_free_ports
from server.process import ProcessGroup
from tests.unit.observability import FOLDER

HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
POLL_S = 0.2


def find():
    """Directory of `prometheus` and `promtool`; fetched if this machine has none."""
    script = FOLDER / "fetch_prometheus.sh"
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


class Prometheus:
    """Runs between `with` and its end, scraping one target every second."""

    def __init__(self, target, folder):
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        self._config = folder / "prometheus.yml"
        self._config.write_text(yaml.safe_dump(config))
        self._folder = folder
        self._log = folder / "prometheus.log"

    def __enter__(self):
        address = f"{HOST}:{pick_free_ports(HOST).http}"
        self._url = f"http://{address}"
        work = self._folder / "work"  # goes with the process if this one is killed
        work.mkdir()
        command = [
            str(find() / "prometheus"),
            f"--config.file={self._config}",
            f"--storage.tsdb.path={work / 'data'}",
            f"--web.listen-address={address}",
        ]
        self._process = ProcessGroup(command, os.environ, cwd=work, log=self._log)
        try:
            self.wait_for('up{job="adaptive_vit"} == 1')
        except BaseException:
            self._process.stop(10)
            raise
        return self

    def __exit__(self, *_):
        self._process.stop(10)

    def get(self, path, **parameters):
        """The data of an answer of its HTTP API."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression):
        """The samples that an expression has now."""
        return self.get("query", query=expression)["result"]

    def wait_for(self, expression, timeout_s=START_TIMEOUT_S):
        """Wait until an expression has samples, and return them."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = self._ask(expression)
            if found:
                return found
            assert self._process.exit_code is None, self._log.read_text()
            assert time.monotonic() < deadline, f"{expression} has no samples"
            time.sleep(POLL_S)

    def _ask(self, expression):
        try:
            return self.query(expression)
        except OSError:  # Not listening yet, or still reading its storage.
            return []
