"""Renders the HTML report of a finished comparison again, from the files in its folder.

    ./launch.sh report runs/bakeoff                 # writes runs/bakeoff/bakeoff.html; open it in any browser

The bake-off writes the report itself. Nothing is decoded or measured again; this takes a second.
"""

import sys
from pathlib import Path

from eval.report.page import write_report
from trainers.training import launchers

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    with launchers.user_errors():
        print(f"Written: {write_report(Path(sys.argv[1]))}")
