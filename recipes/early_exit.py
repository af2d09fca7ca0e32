"""Trains an early exit of a target, by default at the fastest of several layers, and writes the artifact.

    ./launch.sh early_exit                                       # pocket target and its own text, into runs/early_exit
    ./launch.sh early_exit --exit-layer 3 --num-blocks 1 --recycling
    ./launch.sh early_exit --target T --no-own-norm              # no training, for targets trained with early exits
    ./launch.sh early_exit --width 4 --num-nodes 16              # draft trees that grow by the exit's probabilities
    torchrun --nproc-per-node 2 recipes/early_exit.py --exit-layer 2 --own-head --deepspeed zero2

Shared CPU core, pocket target, `--exit-layer 2 --num-blocks 1 --max-steps 300 --learning-rate 3e-3` on the 1.27 M
tokens of `./launch.sh pseudo_data --max-prompts 10000`: 3 minutes, held-out acceptance 0.510, and 0.549 with
`--recycling`; 1.68 and 1.83 tokens per greedy round on held-out prompts. Layers 1 to 4 with only a norm trained, 100
steps at 5e-3: 0.19, 0.21, 0.24 and 0.49; layer 4 has the highest predicted speed, 0.9 of plain decoding.
"""

from trainers import early_exit
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(early_exit, *parse_settings(early_exit.Settings, RunSettings, description=__doc__))
