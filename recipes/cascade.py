"""Composes trained drafters of which one drafts at each step, as a look-up and heads, into one artifact.

    ./launch.sh cascade --parts runs/lookup runs/medusa              # the one that has brought most a millisecond first
    ./launch.sh cascade --parts runs/lookup runs/medusa --no-adaptive --min-tokens 3        # the first that finds three
    ./launch.sh cascade --target T --data runs/mine --parts runs/a runs/b runs/c

Nothing is trained: of the run's settings those of an optimiser mean nothing here. The artifact holds its parts whole.

Nothing is drafted where plain steps bring more. Pocket target, a share of a core, 8 prompts of 64 tokens, speed by CPU
time: greedily 1.85 times plain decoding for a look-up alone (min_ngram 2, 2.27 tokens a round), 1.75 with Medusa after
it (2.45), 1.73 with Hydra (2.25): a round of heads costs what it brings here. At temperature 1 none of them pays; the
cascades keep 0.96 and 0.99 of the plain speed, where heads alone have 0.79 and 0.72.
"""

import sys
from pathlib import Path

from trainers import cascade
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    try:
        train(cascade, *parse_settings(cascade.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
