"""Fits a draft LM with another tokenizer than the target's, an existing or a new small one, and writes the artifact.

    ./launch.sh translated --draft-model small/llama                # no training; the vocabularies are compared
    ./launch.sh translated --train-vocab 2048 --max-length 512 --learning-rate 3e-3
    ./launch.sh translated --target T --data runs/mine --draft-model small/llama --confidence 0.2

A new one is saved in `draft-model` in the output folder and can be used with other targets too. Its matrices are
trained by Muon, so `--weight-decay` has no effect; an interrupted run continues from its last checkpoint.

Shared CPU core, pocket target, 1.9 M tokens of its own text, of which 300 steps read 1.2 M: 7 minutes for 1.3 M
parameters and 2,048 tokens, 1,851 of them also the target's. On 8 held-out prompts 1.75 tokens per round greedily
(identical output) and 1.34 at temperature 1, where the two distributions overlap by 0.32; a draft takes 0.4 of a step.
"""

from trainers import translated
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(translated, *parse_settings(translated.Settings, RunSettings, description=__doc__))
