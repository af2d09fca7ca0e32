"""Reads models' folders, runs their code only if allowed, and checks loaded weights."""
