"""Artifacts: saving and loading drafters, families, model cards, provenance, published heads, and the hub."""
