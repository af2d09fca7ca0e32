"""Trains Medusa heads for a target, computes their draft tree, and leaves the artifact.

    ./launch.sh distill                                              # pocket target and its own text, into runs/distill
    ./launch.sh distill --config recipes/configs/quickstart-distill.yaml
    ./launch.sh distill --target T --data runs/mine --num-heads 5 --max-steps 2000 --bf16
    torchrun --nproc-per-node 2 recipes/distill.py --deepspeed zero2

Two CPU cores, pocket target: NUMBER.
"""

import sys
from pathlib import Path

from trainers import distill
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(distill, *parse_settings(distill.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
