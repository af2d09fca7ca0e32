"""Composes trained drafters whose trees are joined into one, as heads and looked-up text, into one artifact.

    ./launch.sh merge --parts runs/medusa runs/trigram               # pocket target, into runs/merge
    ./launch.sh merge --parts runs/medusa runs/lookup --num-nodes 4 --least-chance 0.1
    ./launch.sh merge --target T --data runs/mine --parts runs/a runs/b --num-texts 200

Nothing is trained but how often each part's guesses are right, by decoding `--num-texts` rows. At temperatures above 0
parts must draft deterministically, as heads do; a draft LM with a width, hydra's with `--siblings deterministic`.

A share of a CPU core, pocket target, tokens a round in 8 greedy texts (at temperature 1): Medusa 1.66 (1.17), tri-grams
2.96 (1.26), both with 64 nodes 3.07 (1.37), with 16 2.80 (1.28). Medusa and a look-up, 2.27 alone: 2.99 with 8 nodes.
Medusa, look-up and tri-grams: 3.77 (1.32) with 16.
"""

import sys
from pathlib import Path

from trainers import merge
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    try:
        train(merge, *parse_settings(merge.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
