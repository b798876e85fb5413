"""report.paper whose runs are forks of this process; tests/test_compare.py starts the command itself.

tests/paper_runs.py <flags of report.paper>    # by tests/pairs.py
"""

import subprocess
import sys
from types import SimpleNamespace

from pairs import Forked

from report import compare, paper

compare.subprocess = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
sys.exit(paper.main(sys.argv[1:]))
