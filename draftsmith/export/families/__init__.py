"""One module per family that an engine runs: how its artifact is written for that engine."""
