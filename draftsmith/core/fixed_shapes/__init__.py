"""Batch-invariant decoding: forwards in fixed shapes, and the chains that they verify."""
