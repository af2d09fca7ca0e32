"""Lossy verifiers: their output does not have the target's distribution; each docstring says how it differs."""
