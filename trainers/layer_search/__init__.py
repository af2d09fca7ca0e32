"""The search for sublayers that a target drafts best without."""
