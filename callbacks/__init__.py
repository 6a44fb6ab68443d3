"""Observers: delete one from the YAML and the loss curve does not move."""
