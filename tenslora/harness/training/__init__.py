"""The training loop and what it stands on: schedule, metrics, checkpoints, processes."""
