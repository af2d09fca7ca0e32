"""Trains an early exit of a target, at the layer that pays best if none is named, and leaves the artifact.

    ./launch.sh early_exit                                       # pocket target and its own text, into runs/early_exit
    ./launch.sh early_exit --exit-layer 3 --num-blocks 1 --recycling
    ./launch.sh early_exit --target T --no-own-norm              # nothing to train: for targets trained to exit early
    ./launch.sh early_exit --width 4 --num-nodes 16              # trees that grow where the exit is confident
    torchrun --nproc-per-node 2 recipes/early_exit.py --exit-layer 2 --own-head --deepspeed zero2

NUMBERS
"""

import sys
from pathlib import Path

from trainers import early_exit
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(early_exit, *parse_settings(early_exit.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
