"""Code shared by several trainers: losses, heads, early exits, trees, distillation, on-policy text."""
