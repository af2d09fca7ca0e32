"""Trains a copy of a target to be left early (LayerSkip); the artifact brings the copy along, and drafts for it.

    ./launch.sh layer_dropout --data runs/pseudo-data                  # all weights of the pocket target
    ./launch.sh layer_dropout --target T --rank 32 --learning-rate 1e-4     # low-rank changes, by peft
    ./launch.sh layer_dropout --curriculum gradual --max-dropout 0.2
    torchrun --nproc-per-node 2 recipes/layer_dropout.py --deepspeed zero2

Its text is its own: decode with `drafter.target`, and compare speeds with that target's own plain decoding.

A shared CPU core, pocket target, `--max-steps 200 --learning-rate 3e-4` on the 1.27 M tokens of its own greedy text
(`./launch.sh pseudo_data --max-prompts 10000`): 7 minutes; held-out acceptance 0.663 at layer 4 of 8, 0.22 at layer 3;
2.10 tokens a greedy step on held-out prompts. The copy's likeliest token is the target's 97 times in 100.
"""

import sys
from pathlib import Path

from trainers import layer_dropout
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    try:
        train(layer_dropout, *parse_settings(layer_dropout.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
