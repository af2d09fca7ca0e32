"""Leaves lookahead as an artifact, which tries n-grams that the target wrote while it guessed ahead of the text.

    ./launch.sh lookahead                                         # pocket target, into runs/lookahead
    ./launch.sh lookahead --target T --window 15 --level 5 --num-guesses 15

Nothing is learnt: `--max-steps` and the settings of an optimiser mean nothing here. The data are what acceptance is
measured on.
"""

import sys
from pathlib import Path

from trainers import lookahead
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(lookahead, *parse_settings(lookahead.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
