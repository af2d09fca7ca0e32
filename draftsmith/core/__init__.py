"""What everything else is built on: the target and its views, the key-value cache, the draft tree, sampling, batching."""
