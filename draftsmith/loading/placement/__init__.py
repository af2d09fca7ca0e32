"""Where tensors lie: weights spread over devices or processes, or packed for a processor; zeros in unused memory."""
