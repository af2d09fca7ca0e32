"""Searches for the sublayers that a target drafts best without, and leaves the artifact.

./launch.sh layerskip --max-steps 100
"""

import sys
from pathlib import Path

from trainers import layerskip
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(layerskip, *parse_settings(layerskip.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
