"""Makes an artifact of a published DFlash drafter and evaluates it on held-out rows, for comparison with others.

    ./launch.sh import_dflash --head downloads/Qwen3-8B-DFlash-b16 --target T --data runs/mine
    ./launch.sh import_dflash --head D --tree-nodes 32                           # drafts trees

A drafter is a folder with config.json and weights, in the layout of the DFlash repository (vLLM, SGLang), of
speculators or of transformers, downloaded with `hf download` for example. Nothing is trained: optimiser settings have
no effect, and the artifact is written once the held-out rows have been evaluated.
"""

from trainers import import_dflash
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(import_dflash, *parse_settings(import_dflash.Settings, RunSettings, description=__doc__))
