"""Leaves lookahead as an artifact, which tries n-grams that the target wrote while it guessed ahead of the text.

    ./launch.sh lookahead                                         # pocket target, into runs/lookahead
    ./launch.sh lookahead --target T --window 15 --level 5 --num-guesses 15

Nothing is learnt: `--max-steps` and the settings of an optimiser mean nothing here. The data are what acceptance is
measured on.

One CPU core, pocket target, 8 prompts of `python-source`, 64 new tokens: 1.89 tokens a step greedily and 1.17 at
temperature 1. A proposal and what is learnt of it take 0.29 ms, 4.5 % of a plain step; but a draft has 9.7 nodes, so
that a token costs five times the arithmetic of plain decoding: it pays where arithmetic is to spare. By the pocket's
measured costs, by which 10 nodes take 1.5 plain steps, that is 1.24 times plain decoding greedily and 0.80 at
temperature 1. The default is by those costs the best of 21 shapes on 24 prompts (2.06 tokens a step, 1.35 times plain
decoding); on the 8, W 15, N 5 and G 15 have 2.30 tokens a step, 58 nodes and 0.75 times plain decoding.
"""

import sys
from pathlib import Path

from trainers import lookahead
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    try:
        train(lookahead, *parse_settings(lookahead.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
