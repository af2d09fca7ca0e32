"""Drafters inside other engines, which run them by classes of ours."""
