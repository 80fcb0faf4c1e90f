"""A stand-in program for perf_analyzer.

It writes the recorded report and an export of as many requests as it was asked for, and logs its
arguments.
"""

import json
import stat
import sys
from pathlib import Path

from perf.analyzer import Analyzer

DATA = Path(__file__).parent / "data" / "perf_analyzer_2.50"

STAND_IN = """#!{python}
import json, pathlib, shutil, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    sys.exit()
with open({log!r}, "a") as log:
    log.write(json.dumps(arguments) + "\\n")
print({says!r}, file=sys.stderr)
value = lambda option: arguments[arguments.index(option) + 1]
shutil.copy({report!r}, value("-f"))
if "--profile-export-file" in arguments:
    one = '{{"timestamp":%d,"response_timestamps":[%d],"x":[{{"escalated":%s}}]}}'
    requests = ""
    for i in range(int(value("--request-count")) - {lost}):
        start, took = i * 10**6, (9 if i < {slow} else 1) * 10**5
        requests += one % (start, start + took, "true" if i % 2 else "false")
    export = '{{"experiments":[{{"requests":[' + requests + "]}}]}}"
    pathlib.Path(value("--profile-export-file")).write_text(export[:{size}])
"""


class StandIn:
    """Logs its arguments; loses, delays or slows down requests, or is a script of its own."""

    def __init__(self, folder, slow=0, lost=0, size=None, script=None, says=""):
        self.log = folder / "log"
        path = folder / "perf_analyzer"
        report = str(DATA / "report.csv")
        text = script or STAND_IN.format(
            python=sys.executable,
            log=str(self.log),
            report=report,
            slow=slow,
            lost=lost,
            size=size,
            says=says,
        )
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self.analyzer = Analyzer(path)

    def calls(self):
        """The arguments of each call."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]
