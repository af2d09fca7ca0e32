"""Builds and decodes a tiny model of every architecture of the installed transformers."""
