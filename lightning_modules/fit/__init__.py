"""The training loop of all stages: optimizer steps, resuming, checkpoints, signals and unreadable clips."""
