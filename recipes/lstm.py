"""Distils a small LSTM between the target's embedding and output matrix, and leaves the artifact.

./launch.sh lstm                                                # pocket target and its own text, into runs/lstm
./launch.sh lstm --learning-rate 3e-3 --batch-size 16 --max-steps 600 --loss lk_hybrid
./launch.sh lstm --target T --data runs/mine --hidden-size 1024 --rank 256 --dropout 0.2 --drop-connect 0.2 --bf16
torchrun --nproc-per-node 2 recipes/lstm.py --deepspeed zero2
"""

import sys
from pathlib import Path

from trainers import lstm
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(lstm, *parse_settings(lstm.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
