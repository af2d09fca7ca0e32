"""Pictures: the bake-off, learning curves, pairs of drafters, sizes of compressed copies."""
