"""Distils a small draft LM from the target's text, and optionally its distributions, and writes the artifact.

    ./launch.sh distill                                             # pocket target and its own text, into runs/distill
    ./launch.sh distill --start layers --num-layers 1 --loss forward_kl         # the quickstart's on the pocket target
    ./launch.sh distill --target T --data runs/mine --init small/llama --loss lk_hybrid --max-steps 2000 --bf16
    ./launch.sh distill --rank 128 --shortlist 2048                 # projection of the target's embedding and LM head
    ./launch.sh distill --shape tree                                # drafts the tree that is fastest on this machine
    ./launch.sh distill --target data/pocket-seq2seq --data runs/s2s --rank 128         # text of an encoder-decoder
    torchrun --nproc-per-node 2 recipes/distill.py --deepspeed zero2

Two CPU cores, pocket target, the preset on 94 k tokens: 75 s, held-out acceptance 0.44, greedy agreement 47 %. 300
steps of 8 rows at 3e-3 on 1.27 M tokens, with cross-entropy: acceptance 0.24 with its own embedding, 0.34 at --rank 64,
0.36 at 128; a drafted token takes 0.29, 0.23 and 0.25 of a plain step.
"""

from trainers import distill
from trainers.training import launchers
from trainers.training.loop import train
from trainers.training.run_settings import RunSettings
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        train(distill, *parse_settings(distill.Settings, RunSettings, description=__doc__))
