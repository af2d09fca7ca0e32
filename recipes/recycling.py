"""Fills a matrix of likely successors from the target's own text and leaves the artifact, which goes on learning.

    ./launch.sh recycling                                           # pocket target, its own text, into runs/recycling
    ./launch.sh recycling --target T --data runs/mine --max-steps 1000
    ./launch.sh recycling --tree-nodes 80                           # as many nodes as in the paper

`--max-steps` is how many batches the target reads; a teacher store that holds its logits saves it that. The settings of
an optimiser mean nothing here. A killed run goes on from the parts that it had finished.
"""

import sys
from pathlib import Path

from trainers import recycling
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(recycling, *parse_settings(recycling.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
