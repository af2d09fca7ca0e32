"""Side by side: decoding (measure.py), the bake-off (compare.py), its table (table.py), its picture (plots.py)."""
