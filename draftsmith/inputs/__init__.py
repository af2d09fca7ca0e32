"""Converts and checks the arguments of the Python API before anything runs."""
