"""Where a model's weights lie: spread over devices or processes, or packed for a processor."""
