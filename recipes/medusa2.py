"""Trains Medusa heads and low-rank changes of the target together, and leaves the artifact that tunes the target.

./launch.sh medusa2                                             # pocket target and its own text, into runs/medusa2
./launch.sh medusa2 --method two_stage --head-steps 500 --max-steps 2000
./launch.sh medusa2 --target T --data runs/mine --learning-rate 1e-4 --bf16 --modules q_proj k_proj v_proj o_proj
torchrun --nproc-per-node 2 recipes/medusa2.py --deepspeed zero2
"""

import sys
from pathlib import Path

from trainers import medusa2
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(medusa2, *parse_settings(medusa2.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
