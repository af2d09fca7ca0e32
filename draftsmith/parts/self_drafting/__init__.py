"""Drafting with the target's own layers: early exit, skipped sublayers, fine-tuned copies."""
