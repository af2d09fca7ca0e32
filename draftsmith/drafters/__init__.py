"""One family of drafters a module or folder; `draftsmith.artifacts.families.find(name)` is the only way in."""
