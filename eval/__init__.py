"""Side-by-side measurement: decoding (measure.py), the bake-off (compare.py), its table (table.py) and picture (plots.py)."""
