"""Trains a prophet, a small decoder that goes on from the target's last hidden states, and leaves the artifact.

./launch.sh prophet                                             # pocket target and its own text, into runs/prophet
./launch.sh prophet --num-states 4 --num-draft 5 --num-layers 1
./launch.sh prophet --target T --data runs/mine --loss forward_kl --max-steps 2000 --bf16
./launch.sh prophet --width 4 --num-nodes 16                    # drafts trees that grow where it is confident
torchrun --nproc-per-node 2 recipes/prophet.py --deepspeed zero2
"""

import sys
from pathlib import Path

from trainers import prophet
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(prophet, *parse_settings(prophet.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
