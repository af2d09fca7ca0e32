"""What draftsmith knows of kinds of models: their state, masks and positions, and how a target is checked."""
