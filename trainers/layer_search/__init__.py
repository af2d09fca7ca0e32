"""Search for the sublayers of a target to skip in self-drafting."""
