"""Lossless verifiers from the literature that `verifier="auto"` does not choose."""
