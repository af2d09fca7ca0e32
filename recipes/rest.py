"""Stores text in a suffix array and leaves the artifact, which drafts what followed the text's last tokens there.

    ./launch.sh rest                                       # pocket target, its own text, into runs/rest
    ./launch.sh rest --target T --data runs/mine --budget-mb 500
    ./launch.sh rest --data texts/ --context 0             # any JSONL, Parquet or folder of text, prompts left out

Nothing is learnt: `--max-steps` and the settings of an optimiser mean nothing here. A killed build goes on from the
shards that it had finished.
"""

import sys
from pathlib import Path

from trainers import rest
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(rest, *parse_settings(rest.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
