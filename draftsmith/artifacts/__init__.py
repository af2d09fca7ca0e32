"""Artifacts: saving and loading drafters, their model cards, provenance, and the Hugging Face hub."""
