"""Composes trained drafters of which one drafts at each step, as a look-up and heads, into one artifact.

    ./launch.sh cascade --parts runs/lookup runs/medusa              # the one that has brought most a millisecond first
    ./launch.sh cascade --parts runs/lookup runs/medusa --no-adaptive --min-tokens 3        # the first that finds three
    ./launch.sh cascade --target T --data runs/mine --parts runs/a runs/b runs/c

Nothing is trained: of the run's settings those of an optimiser mean nothing here. The artifact holds its parts whole.
"""

import sys
from pathlib import Path

from trainers import cascade
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(cascade, *parse_settings(cascade.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
