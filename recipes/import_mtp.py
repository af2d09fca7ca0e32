"""Makes an artifact of the MTP head that a target brings in its own checkpoint, and evaluates it on held-out rows.

    ./launch.sh import_mtp --target downloads/Qwen3.5-4B --data runs/mine
    ./launch.sh import_mtp --target T --data D --num-draft 2 --shortlist 32768

Checkpoints of Qwen3-Next, Qwen3.5, DeepSeek-V3, GLM-4.5 and MiMo-V2 have such heads, which transformers leaves out when
it loads them. Nothing is trained: optimiser settings have no effect, and the artifact is written once the held-out rows
have been evaluated. `./launch.sh mtp --start-from runs/import_mtp` trains the head on.
"""

from trainers import import_mtp
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(import_mtp, *parse_settings(import_mtp.Settings, RunSettings, description=__doc__))
