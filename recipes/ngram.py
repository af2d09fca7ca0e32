"""Counts n-grams of the target's own text and leaves the artifact of their Kneser-Ney law.

    ./launch.sh ngram                                  # pocket target, its own text, into runs/ngram
    ./launch.sh ngram --target T --data runs/mine --budget-mb 100
    ./launch.sh ngram --sampled --length fixed

There are no steps: of the run's settings, those of an optimiser mean nothing here. A killed run goes on from the parts
that it had counted. Nothing need fit into memory but the n-grams of some range of last tokens.
"""

import sys
from pathlib import Path

from trainers import ngram
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(ngram, *parse_settings(ngram.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
