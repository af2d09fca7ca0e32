"""What a training run would cost and reach, before it starts: `--dry-run` and `--pilot`."""
