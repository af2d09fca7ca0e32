"""Counts which tokens follow which two in the target's own text, and leaves a store that drafts trees.

./launch.sh trigram                                             # pocket target, its own text, into runs/trigram
./launch.sh trigram --target T --data runs/mine --budget-mb 200
./launch.sh trigram --num-nodes 8                               # small trees, where a node costs much to verify
./launch.sh trigram --maker full                                # the likeliest texts instead of a random search
"""

import sys
from pathlib import Path

from trainers import trigram
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(trigram, *parse_settings(trigram.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
