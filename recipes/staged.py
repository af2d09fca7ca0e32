"""Composes a draft model and a small drafter that speculates for it, so that it drafts sooner, into one artifact.

    ./launch.sh staged --parts runs/distill runs/lookup              # pocket target, into runs/staged
    ./launch.sh staged --target T --data runs/mine --parts runs/draft runs/ngram --num-draft 12 --length fixed

Nothing is trained. The second part may have been made for the target if it goes by the text alone. Its drafts are
verified by the draft model, whose own law the chains therefore follow.

It pays where the draft model's own text is easily guessed and several of its tokens cost hardly more than one. Pocket
target: 1.65 tokens a round, as the draft model alone; a drafted token takes 4.5 ms of a share of a core instead of 3.3.
"""

import sys
from pathlib import Path

from trainers import staged
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    try:
        train(staged, *parse_settings(staged.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
