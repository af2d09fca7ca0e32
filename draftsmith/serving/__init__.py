"""Drafters inside other serving engines, as classes that those engines load."""
