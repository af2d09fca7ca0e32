"""Trains Hydra heads, each told the tokens before its own, computes their draft tree, and leaves the artifact.

    ./launch.sh hydra                                               # pocket target and its own text, into runs/hydra
    ./launch.sh hydra --prefix-attention --num-blocks 4             # Hydra++
    ./launch.sh hydra --target T --data runs/mine --siblings without_replacement --max-steps 2000 --bf16
    ./launch.sh hydra --width 4                                     # trees that grow where the heads are confident
    torchrun --nproc-per-node 2 recipes/hydra.py --deepspeed zero2

The paper's own settings are `--own-head --learning-rate 5e-4 --weight-decay 0.1 --warmup-steps 100 --batch-size 32`.
"""

import sys
from pathlib import Path

from trainers import hydra
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(hydra, *parse_settings(hydra.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
