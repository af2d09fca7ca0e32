"""Reads and loads models: what a folder holds, whether its code may run, and checks of loaded weights."""
