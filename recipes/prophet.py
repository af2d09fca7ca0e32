"""Trains a prophet, a small decoder that continues the target's last hidden states, and writes the artifact.

    ./launch.sh prophet                                             # pocket target and its own text, into runs/prophet
    ./launch.sh prophet --num-states 4 --num-draft 5 --num-layers 1
    ./launch.sh prophet --target T --data runs/mine --loss forward_kl --max-steps 2000 --bf16
    ./launch.sh prophet --width 4 --num-nodes 16                    # draft trees that grow by its probabilities
    ./launch.sh prophet --joint --own-head --data my-text.jsonl     # also trains a copy of the target, the new target
    torchrun --nproc-per-node 2 recipes/prophet.py --deepspeed zero2

Shared CPU core, pocket target, `--windows 24 --learning-rate 2e-3 --max-steps 500 --max-held-out 16` on the 1.27 M
tokens of `./launch.sh pseudo_data --max-prompts 10000`: 7 minutes; held-out acceptance 1.81 of 7 tokens, accuracy of
the first 51 %. On 8 held-out prompts 1.8 tokens per target forward greedily with chains and 2.2 with `--width 4`; at
temperature 1, 1.5 and 1.4. It is no faster on the pocket target, whose forward costs little compared to two blocks and
an LM head for every drafted token.
"""

from trainers import prophet
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(prophet, *parse_settings(prophet.Settings, RunSettings, description=__doc__))
