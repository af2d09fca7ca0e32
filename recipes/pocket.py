"""Trains the pocket targets: the 7 M Llama and the 7 M T5 that recipes and tests use by default.

    ./launch.sh pocket                     # both, on Python source found on this machine; continues if interrupted
    ./launch.sh pocket --kind causal --max-steps 300 --max-files 400 --output runs/pocket-trial   # a trial

Hardware and results: see the model cards, `data/pocket/README.md` and `data/pocket-seq2seq/README.md`.
"""

from trainers.pocket import PocketSettings, train_pocket
from trainers.training import launchers
from trainers.training.settings import parse_settings

if __name__ == "__main__":
    with launchers.user_errors():
        (settings,) = parse_settings(PocketSettings, description=__doc__)
        train_pocket(settings)
