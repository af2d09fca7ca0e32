"""Layers, recurrent state and LM heads of neural drafters."""
