"""Trains a multi-token prediction head recursively, from nothing or from the one that the target brings.

./launch.sh mtp                                                 # pocket target and its own text, into runs/mtp
./launch.sh mtp --target T --data runs/mine --start-from runs/import_mtp --learning-rate 5e-5 --bf16
./launch.sh mtp --num-steps 5 --num-draft 5 --shortlist 8192 --loss forward_kl
torchrun --nproc-per-node 2 recipes/mtp.py --deepspeed zero2
draftsmith export runs/mtp --to vllm runs/served                # the checkpoint with the trained head in it
"""

from trainers import mtp
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(mtp, *parse_settings(mtp.Settings, RunSettings, description=__doc__))
