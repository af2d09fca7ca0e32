"""Compression of a target: pruned layers and widths, zeroed weights, and the importance that they are chosen by."""
