"""Losses that are computed together with their gradient."""
