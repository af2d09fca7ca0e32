"""Distils causal gated convolutions between the target's embedding and output matrix, and leaves the artifact.

./launch.sh cnn                                                 # pocket target and its own text, into runs/cnn
./launch.sh cnn --learning-rate 3e-3 --batch-size 16 --max-steps 600 --loss lk_hybrid
./launch.sh cnn --target T --data runs/mine --num-channels 512 --dilations 1 1 2 4 8 --rank 256 --bf16
torchrun --nproc-per-node 2 recipes/cnn.py --deepspeed zero2
"""

import sys
from pathlib import Path

from trainers import cnn
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(cnn, *parse_settings(cnn.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
