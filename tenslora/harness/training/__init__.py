"""Training and evaluation: the loop, its tasks and metrics, the schedule, checkpoints, and processes."""
