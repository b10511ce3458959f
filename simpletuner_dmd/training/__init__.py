"""The training loop and what it owns: optimizers, schedules, EMA, checkpoints, tracking, progress."""
