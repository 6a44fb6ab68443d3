"""Callbacks that only observe: removing one from the YAML changes nothing about the training."""
