"""Evaluation: the bake-off (compare.py), the losslessness certificate (lossless.py), reports, plots and the doctor."""
