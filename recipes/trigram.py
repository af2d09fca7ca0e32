"""Counts which tokens follow which pairs in the target's own text, and writes an artifact that drafts trees from it.

    ./launch.sh trigram                                             # pocket target, its own text, into runs/trigram
    ./launch.sh trigram --num-nodes 8                               # small trees, where every node has a cost
    ./launch.sh trigram --maker full                                # the likeliest texts instead of a random search
    ./launch.sh trigram --target T --data runs/mine --budget-mb 200

The optimiser's settings have no effect. The search is compiled when a drafter is first loaded, which takes about
fifteen seconds and is cached.

Shared CPU core, pocket target, 1.27 M tokens of its own greedy text: counting takes a second, 19 s with loading and
evaluation; 43,000 pairs of tokens and 88,000 successors, 1.4 MB; held-out acceptance 3.0 drafted tokens per round. On
8 prompts of python-source 2.96 tokens per round greedily and 1.29 at temperature 1, with 39 nodes; with `--num-nodes
8` 2.52 and 1.24. A proposal takes 0.16 ms, or 0.4 ms during decoding on shared cores, 3 % of a plain step.
"""

from trainers import trigram
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(trigram, *parse_settings(trigram.Settings, RunSettings, description=__doc__))
