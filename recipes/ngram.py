"""Counts n-grams of the target's own text and leaves the artifact of their Kneser-Ney law.

    ./launch.sh ngram                                  # pocket target, its own text, into runs/ngram
    ./launch.sh ngram --target T --data runs/mine --budget-mb 100
    ./launch.sh ngram --sampled --length fixed
    ./launch.sh ngram --target data/pocket-seq2seq --data runs/s2s      # of what an encoder-decoder writes

There are no steps: of the run's settings, those of an optimiser mean nothing here. A killed run goes on from the parts
that it had counted. Nothing need fit into memory but the n-grams that follow some range of last tokens.

A share of a CPU core, 1.2 M tokens that the pocket target wrote: 9 s, of which counting and building take 0.8; 11 MB.
2.93 nats a held-out token, where adding one to counts gives 4.66 at best and the target itself 0.36; within 6 MB
2.93 still, within 2 MB 3.37. On 8 prompts 3.82 tokens a round at temperature 0 (1.99 by the store and 2.46 by the text
at hand alone), and 1.41 at temperature 1 (1.64 with `--length fixed`).

The pocket encoder-decoder, 8,158 functions, 64 held-out ones: of what it wrote greedily (115,000 tokens, 0.6 MB)
3.25 tokens a round at temperature 0 and 1.40 at 1; of the functions' docstrings (130,000 tokens, 6 MB) 1.82 and 1.49.
"""

import sys
from pathlib import Path

from trainers import ngram
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    try:
        train(ngram, *parse_settings(ngram.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
