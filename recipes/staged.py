"""Combines a draft model with a smaller drafter that speculates for it, so that it drafts faster, into one artifact.

    ./launch.sh staged --parts runs/distill runs/lookup              # pocket target, into runs/staged
    ./launch.sh staged --target T --data runs/mine --parts runs/draft runs/ngram --num-draft 12 --length fixed

Nothing is trained. The second part may have been made for the target if it reads only text. Its drafts are verified by
the draft model, so the chains follow the draft model's distribution.

It pays if the draft model's text is easy to predict and verifying several of its tokens costs little more than one.
Pocket target: 1.65 tokens per round, as with the draft model alone; a drafted token takes 4.5 ms on a shared core
instead of 3.3 ms.
"""

from trainers import staged
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(staged, *parse_settings(staged.Settings, RunSettings, description=__doc__))
