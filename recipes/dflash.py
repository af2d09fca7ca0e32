"""Trains DFlash's layers, which draft a block in one pass, on random blocks of the target's text.

./launch.sh dflash                                              # pocket target and its own text, into runs/dflash
./launch.sh dflash --target T --data runs/mine --num-layers 5 --block-size 16 --decay 7 --num-anchors 512 --bf16
./launch.sh dflash --loss lk --shortlist 8192 --tree-nodes 16
./launch.sh dflash --markov-rank 64 --confidence --length confidence=0.4          # DSpark's heads
./launch.sh dflash --target T --data runs/mine --text-steps 200                   # begins without running the target
torchrun --nproc-per-node 2 recipes/dflash.py --deepspeed zero2
"""

from trainers import dflash
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(dflash, *parse_settings(dflash.Settings, RunSettings, description=__doc__))
