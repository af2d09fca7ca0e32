"""The training loop: settings, launchers, gradient descent, evaluation, checkpoints, logs."""
