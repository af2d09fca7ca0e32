"""Leaves prompt lookup as an artifact, which copies what followed the same tokens earlier in the text.

    ./launch.sh lookup                                      # pocket target, into runs/lookup
    ./launch.sh lookup --num-continuations 3                # a tree of what followed in three places
    ./launch.sh lookup --target T --data runs/mine --max-ngram 5 --num-draft 20

Nothing is learnt: `--max-steps` and the settings of an optimiser mean nothing here. The data are what acceptance is
measured on.
"""

import sys
from pathlib import Path

from trainers import lookup
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(lookup, *parse_settings(lookup.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
