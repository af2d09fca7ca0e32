"""Makes an artifact of a published draft model and evaluates it on held-out rows, for comparison with other drafters.

    ./launch.sh import_lm --init downloads/draft-q8_0.gguf --target T --data runs/mine
    ./launch.sh import_lm --init owner/small-model --num-draft 3 --length confidence=0.4

The model is a GGUF file, a transformers folder or a hub name, and has the target's tokenizer. Nothing is trained
(./launch.sh distill --init MODEL trains it): optimiser settings have no effect, and the artifact is written once the
held-out rows have been evaluated.
"""

from trainers import import_lm
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(import_lm, *parse_settings(import_lm.Settings, RunSettings, description=__doc__))
