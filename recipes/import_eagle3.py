"""Makes an artifact of a published EAGLE-3 head and evaluates it on held-out rows, for comparison with other drafters.

    ./launch.sh import_eagle3 --head downloads/EAGLE3-LLaMA3.1-Instruct-8B --target T --data runs/mine
    ./launch.sh import_eagle3 --head H --width 0 --num-draft 3                  # drafts chains
    ./launch.sh import_eagle3 --head eagle3-q8_0.gguf --target T --data D       # a head for llama.cpp

A head is a folder with config.json and weights, as the EAGLE repository, SpecForge (SGLang) or speculators write it,
downloaded with `hf download` for example, or a GGUF file of llama.cpp's architecture eagle3. Nothing is trained:
optimiser settings have no effect, and the artifact is written once the held-out rows have been evaluated.
"""

from trainers import import_eagle3
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(import_eagle3, *parse_settings(import_eagle3.Settings, RunSettings, description=__doc__))
