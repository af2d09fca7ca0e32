"""Writes an artifact for lookahead decoding, which drafts n-grams that the target generates beside the text.

    ./launch.sh lookahead                                         # pocket target, into runs/lookahead
    ./launch.sh lookahead --target T --window 15 --level 5 --num-guesses 15

Nothing is trained, so `--max-steps` and the optimiser's settings have no effect; the data only serve to measure
acceptance.

One CPU core, pocket target, 8 prompts of `python-source`, 64 new tokens: 1.89 tokens per round greedily and 1.17 at
temperature 1. Proposing and updating take 0.29 ms, 4.5 % of a plain step; but a draft has 9.7 nodes, so a token costs
five times the arithmetic of plain decoding, which pays where arithmetic is cheap. By the pocket's measured costs, where
10 nodes take 1.5 plain steps, that is 1.24 times plain decoding greedily and 0.80 at temperature 1. By those costs the
default is the best of 21 shapes on 24 prompts (2.06 tokens per round, 1.35 times plain decoding); on the 8 prompts, W
15, N 5 and G 15 have 2.30 tokens per round, 58 nodes and 0.75 times plain decoding.
"""

from trainers import lookahead
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(lookahead, *parse_settings(lookahead.Settings, RunSettings, description=__doc__))
