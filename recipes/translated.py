"""Fits a draft LM with another tokenizer than the target's, a given one or a small one of its own; leaves the artifact.

./launch.sh translated --draft-model small/llama                # nothing is trained; the vocabularies are compared
./launch.sh translated --train-vocab 2048 --max-length 256 --max-steps 300 --learning-rate 3e-3
"""

import sys
from pathlib import Path

from trainers import translated
from trainers.loop import train
from trainers.run import RunSettings
from trainers.settings import parse_settings

if __name__ == "__main__":
    try:
        train(translated, *parse_settings(translated.Settings, RunSettings, description=__doc__))
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
