"""Trains Hydra heads, each conditioned on the draft tokens before its own, and writes the artifact with its draft tree.

    ./launch.sh hydra                                               # pocket target and its own text, into runs/hydra
    ./launch.sh hydra --prefix-attention --num-blocks 4             # Hydra++
    ./launch.sh hydra --target T --data runs/mine --siblings without_replacement --max-steps 2000 --bf16
    ./launch.sh hydra --width 4                                     # draft trees that grow by the heads' probabilities
    torchrun --nproc-per-node 2 recipes/hydra.py --deepspeed zero2

One CPU core, pocket target, `--learning-rate 3e-3 --max-steps 300` on the 1.27 M tokens of `./launch.sh pseudo_data
--max-prompts 10000`: four and a half minutes; accuracy by head 43, 39, 41 and 36 %, held-out acceptance 0.85; as
Hydra++ 50, 44, 48 and 42 %, acceptance 1.05; Medusa heads trained alike 0.57. On 8 held-out prompts with trees of 8
nodes: 2.04 tokens per round, 2.01 for Hydra++, 1.61 for Medusa. At temperature 1, Hydra++ has 1.82 with siblings drawn
without replacement and 1.38 with deterministic ones.
The paper's settings are `--own-head --learning-rate 5e-4 --weight-decay 0.1 --warmup-steps 100 --batch-size 32`.
"""

from trainers import hydra
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(hydra, *parse_settings(hydra.Settings, RunSettings, description=__doc__))
