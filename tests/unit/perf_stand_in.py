"""A stand-in program for perf_analyzer.

It writes the recorded report and logs its arguments.
"""

import json
import stat
import sys
from pathlib import Path

from perf.analyzer_install import Analyzer

DATA = Path(__file__).parent / "data" / "perf_analyzer_2.50"

STAND_IN = """#!{python}
import json, shutil, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    sys.exit()
with open({log!r}, "a") as log:
    log.write(json.dumps(arguments) + "\\n")
print({says!r}, file=sys.stderr)
value = lambda option: arguments[arguments.index(option) + 1]
shutil.copy({report!r}, value("-f"))
"""


class StandIn:
    """Logs its arguments; or is a script of its own."""

    def __init__(self, folder, script=None, says=""):
        self.log = folder / "log"
        path = folder / "perf_analyzer"
        report = str(DATA / "report.csv")
        text = script or STAND_IN.format(
            python=sys.executable,
            log=str(self.log),
            report=report,
            says=says,
        )
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self.analyzer = Analyzer(path)

    def calls(self):
        """The arguments of each call."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]
