"""Trains Hydra heads, each told the tokens before its own, computes their draft tree, and leaves the artifact.

    ./launch.sh hydra                                               # pocket target and its own text, into runs/hydra
    ./launch.sh hydra --prefix-attention --num-blocks 4             # Hydra++
    ./launch.sh hydra --target T --data runs/mine --siblings without_replacement --max-steps 2000 --bf16
    ./launch.sh hydra --width 4                                     # trees that grow where the heads are confident
    torchrun --nproc-per-node 2 recipes/hydra.py --deepspeed zero2

One CPU core, pocket target, `--learning-rate 3e-3 --max-steps 300` on the 1.27 M tokens of `./launch.sh pseudo_data
--max-prompts 10000`: four and a half minutes; heads right 43, 39, 41 and 36 times in 100, held-out acceptance 0.85; as
Hydra++ 50, 44, 48 and 42, acceptance 1.05; Medusa heads so trained 0.57. On 8 held-out prompts, with 8 nodes computed
for each: 2.04 tokens a step, 2.01 as Hydra++, 1.61 by Medusa's. At temperature 1, by Hydra++, 1.82 where siblings are
drawn without replacement and 1.38 where they are deterministic.
The paper's own settings are `--own-head --learning-rate 5e-4 --weight-decay 0.1 --warmup-steps 100 --batch-size 32`.
"""

import sys
from pathlib import Path

from trainers import hydra
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    try:
        train(hydra, *parse_settings(hydra.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
