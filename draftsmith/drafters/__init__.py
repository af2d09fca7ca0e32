"""Families of drafters, one per module or package; import them by `draftsmith.artifacts.families.find(name)` only."""
