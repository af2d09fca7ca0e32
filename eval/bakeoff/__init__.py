"""Measuring drafters side by side: who competes, decoding and timing, rows, forecasts, results."""
