"""Combines trained drafters, one of which drafts in each step (such as lookup and heads), into one artifact.

    ./launch.sh cascade --parts runs/lookup runs/medusa              # tries first what gave most tokens per ms so far
    ./launch.sh cascade --parts runs/lookup runs/medusa --no-adaptive --min-tokens 3    # first draft of at least 3
    ./launch.sh cascade --target T --data runs/mine --parts runs/a runs/b runs/c

Nothing is trained, so the optimiser's settings have no effect. The artifact contains its parts.

Drafting is skipped where plain steps are faster. Pocket target, shared CPU core, 8 prompts of 64 tokens, speed by CPU
time, greedy: lookup alone (min_ngram 2) 1.85 times plain decoding at 2.27 tokens per round; with Medusa after it 1.75
at 2.45; with Hydra 1.73 at 2.25, as a round of heads costs here what it gains. At temperature 1 none is faster than
plain decoding: the cascades reach 0.96 and 0.99 of its speed, heads alone 0.79 and 0.72.
"""

from trainers import cascade
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(cascade, *parse_settings(cascade.Settings, RunSettings, description=__doc__))
