"""Training loops around a stage: optimizer steps, resuming, checkpoints, signals and unreadable clips."""
