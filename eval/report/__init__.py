"""A comparison's tables and its HTML page."""
