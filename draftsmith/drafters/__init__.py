"""One family of drafters a module or folder; `draftsmith.core.drafter.find(name)` is the only way in."""
