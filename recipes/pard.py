"""Continues a draft LM so that it drafts several tokens in one forward (PARD), from text alone.

With `--features` the target's hidden layers at each token are added to the embedding of the next one, and every loss
but cross-entropy reads the last hidden layer: with all of them in a teacher store the target need not be run.

./launch.sh pard                                                # the pocket's first layer, into runs/pard
./launch.sh distill --hidden-size 288 --output runs/small && ./launch.sh pard --parts runs/small
./launch.sh pard --target T --data runs/mine --parts runs/small --num-draft 12 --learning-rate 3e-5 --max-steps 20000
./launch.sh pard --target smollm2 --data runs/store --parts runs/small --features 7 15 23 30 --loss pard2      # PARD-2
torchrun --nproc-per-node 2 recipes/pard.py --deepspeed zero2
"""

from trainers import pard
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(pard, *parse_settings(pard.Settings, RunSettings, description=__doc__))
