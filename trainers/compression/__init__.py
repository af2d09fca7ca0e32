"""Smaller copies of a target: pruned layers and widths, zeroed weights, and what they are chosen by."""
