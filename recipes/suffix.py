"""Stores text in a suffix array and leaves the artifact, which drafts by how often what followed the same tokens.

    ./launch.sh suffix                                       # pocket target, its own text, into runs/suffix
    ./launch.sh suffix --target T --data runs/mine --budget-mb 500
    ./launch.sh suffix --no-branches --factor 2 --offset 2   # chains, and longer drafts

Nothing is learnt: `--max-steps` and the settings of an optimiser mean nothing here. A killed build goes on from the
shards that it had finished. Calls are remembered for later ones: where a prompt is decoded more than once to be timed,
give `--recent-tokens 0`.

A share of a CPU core, pocket target, 1.27 M tokens of its own text: 9 s, of which sorting is 0.6, 8 MB, opened in a few
milliseconds; held-out acceptance 5.65 tokens a round. On 8 prompts of `python-source` 3.4 tokens a step greedily and
1.25 at temperature 1 (without a store 2.2 and 1.1); a proposal takes 0.25 ms, 4 % of a plain step.
"""

import sys
from pathlib import Path

from trainers import suffix
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    try:
        train(suffix, *parse_settings(suffix.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
