"""Trains Kangaroo's adapter on an early exit of a target, or one at each of several layers, and leaves the artifact.

./launch.sh kangaroo                                            # pocket target and its own text, into runs/kangaroo
./launch.sh kangaroo --exit-layer 0                             # keeps the layer that promises most tokens a second
./launch.sh kangaroo --target T --data runs/mine --exit-layer 3 --max-steps 2000 --bf16
./launch.sh kangaroo --width 4 --num-nodes 16                   # trees that grow where the adapter is confident
torchrun --nproc-per-node 2 recipes/kangaroo.py --deepspeed zero2
"""

import sys
from pathlib import Path

from trainers import kangaroo
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(kangaroo, *parse_settings(kangaroo.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
