"""Trains an EAGLE-3 layer on features of a target, by the drafts it would make, and leaves the artifact.

    ./launch.sh eagle3                                              # pocket target and its own text, into runs/eagle3
    ./launch.sh eagle3 --target T --data runs/mine --num-heads 32 --draft-vocab 32000 --max-steps 20000 --bf16
    ./launch.sh eagle3 --fusion-norm each --norm-output             # EAGLE-3.1
    torchrun --nproc-per-node 2 recipes/eagle3.py --deepspeed zero2
"""

import sys
from pathlib import Path

from trainers import eagle3
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(eagle3, *parse_settings(eagle3.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
