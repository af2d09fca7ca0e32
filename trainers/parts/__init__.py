"""What several trainers share: losses, heads, exits, trees, distillation, on-policy text."""
