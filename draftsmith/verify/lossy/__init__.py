"""Verifiers that change the target's distribution; each says how in its docstring."""
