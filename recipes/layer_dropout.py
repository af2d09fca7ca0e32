"""Trains a copy of a target for early exit (LayerSkip); the artifact contains the copy, which is the new target.

    ./launch.sh layer_dropout --data runs/pseudo-data                  # all weights of the pocket target
    ./launch.sh layer_dropout --target T --rank 32 --learning-rate 1e-4     # low-rank adapters, by peft
    ./launch.sh layer_dropout --curriculum gradual --max-dropout 0.2
    torchrun --nproc-per-node 2 recipes/layer_dropout.py --deepspeed zero2

The copy's text differs from the target's: decode with `drafter.target`, and compare speed with its plain decoding.

Shared CPU core, pocket target, `--max-steps 200 --learning-rate 3e-4` on the 1.27 M tokens of its own greedy text
(`./launch.sh pseudo_data --max-prompts 10000`): 7 minutes; held-out acceptance 0.663 at layer 4 of 8, 0.22 at layer 3;
2.10 tokens per greedy round on held-out prompts. The copy's most likely token is the target's at 97 % of positions.
"""

from trainers import layer_dropout
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(layer_dropout, *parse_settings(layer_dropout.Settings, RunSettings, description=__doc__))
