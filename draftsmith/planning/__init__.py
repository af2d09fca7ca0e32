"""Plans draft lengths for serving: measures one target with one drafter, and writes the tables that engines read."""
