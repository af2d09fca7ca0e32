"""Makes an artifact of the MTP heads that a target brings in its own checkpoint, and evaluates it on held-out rows.

    ./launch.sh import_mtp --target downloads/Qwen3.5-4B --data runs/mine
    ./launch.sh import_mtp --target T --data D --num-draft 2 --shortlist 32768

Checkpoints of Qwen3-Next, Qwen3.5, DeepSeek-V3, GLM-4.5, MiMo-7B and MiMo-V2 have such heads, which transformers
leaves out when it loads them. For MiMo-7B, whose blocks are Qwen2's, write `"model_type": "qwen2"` into its
config.json. Nothing is trained: optimiser settings have no effect, and the artifact is written once the held-out rows
have been evaluated. `./launch.sh mtp --start-from runs/import_mtp` trains the heads on, with the same --num-heads.
vLLM drafts with the first head alone: `--num-heads 1` does as well.
"""

from trainers import import_mtp
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(import_mtp, *parse_settings(import_mtp.Settings, RunSettings, description=__doc__))
