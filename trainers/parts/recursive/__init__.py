"""Training of drafters that read their own output: drafts of several steps, from every position of a text."""
