"""Searches for the sublayers that a target drafts best without, and leaves the artifact, which has no weights.

    ./launch.sh layerskip --max-steps 100                           # pocket target, its own text, into runs/layerskip
    ./launch.sh layerskip --max-steps 100 --target T --data runs/mine --online
    ./launch.sh layerskip --max-steps 100 --objective acceptance --skip-ratio 0.45 --search greedy
    ./launch.sh layerskip --max-steps 100 --objective speed         # decodes for real, on a quiet machine

`--max-steps` is how many choices are scored; of the run's other settings, those of an optimiser mean nothing here.
`evaluations.jsonl` in the output holds every one, and a killed run goes on from it.

A share of a CPU core, pocket target, 8 texts of its own: 84 s for 100 choices; the best, which was the 22nd,
leaves out 4 attentions and 7 feed-forward layers of 8 each. A drafted token then costs 0.44 of a step, and 0.83 of the
target's tokens are guessed right in held-out text: 3.4 tokens a round by rereading it, 3.2 by decoding 8 prompts of it.
"""

import sys
from pathlib import Path

from trainers import layerskip
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    try:
        train(layerskip, *parse_settings(layerskip.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
