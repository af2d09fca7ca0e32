"""Drafters that others published: the names of their tensors, and their configurations."""
