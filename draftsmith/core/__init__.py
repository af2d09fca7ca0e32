"""The base of everything else: target, model views, key-value cache, draft tree, sampling, batching and statistics."""
