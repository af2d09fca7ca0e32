"""Plots of the bake-off, of learning curves, of pairs of drafters and of compressed copies."""
