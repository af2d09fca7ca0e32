"""Combines trained drafters whose draft trees are merged into one (such as heads and lookup) into one artifact.

    ./launch.sh merge --parts runs/medusa runs/trigram               # pocket target, into runs/merge
    ./launch.sh merge --parts runs/medusa runs/lookup --num-nodes 4 --least-chance 0.1
    ./launch.sh merge --target T --data runs/mine --parts runs/a runs/b --num-texts 200

Nothing is trained; the acceptance rates of the parts' tokens are estimated, by their confidence, by decoding at least
`--num-texts` held-out rows. Parts draft their likeliest tokens at every temperature.

Shared CPU core, pocket target, tokens per round on 8 greedy texts (at temperature 1): Medusa 1.66 (1.17), tri-grams
2.96 (1.26), merged with 64 nodes 3.07 (1.37), with 16 2.80 (1.28). Lookup 2.27, merged with Medusa 2.99 with 8 nodes.
Medusa, lookup and tri-grams: 3.77 (1.32) with 16.
"""

from trainers import merge
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(merge, *parse_settings(merge.Settings, RunSettings, description=__doc__))
