"""Lossless verifiers of the literature that `verifier="auto"` does not choose."""
