"""Text for drafters that look text up: documents, suffix arrays, n-gram counts."""
