"""Trains Medusa heads for a target, and writes the artifact with its draft tree.

    ./launch.sh medusa                                              # pocket target and its own text, into runs/medusa
    ./launch.sh medusa --num-blocks 2 --max-steps 180 --learning-rate 5e-3      # the quickstart's on the pocket target
    ./launch.sh medusa --target T --data runs/mine --num-heads 5 --max-steps 2000 --bf16
    torchrun --nproc-per-node 2 recipes/medusa.py --deepspeed zero2

One CPU core, pocket target, `--num-blocks 3 --learning-rate 5e-3 --max-steps 3000` on the 1.27 M tokens of
`./launch.sh pseudo_data --max-prompts 10000`: 37 minutes; accuracy by head 55, 40, 31 and 27 %, held-out acceptance
1.25. The preset, on two cores and 94 k tokens: a minute and a half; 38, 31, 20 and 20 %; acceptance 0.78.
"""

from trainers import medusa
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(medusa, *parse_settings(medusa.Settings, RunSettings, description=__doc__))
