"""Checks that name why a drafter accepts fewer tokens than it did in training."""
