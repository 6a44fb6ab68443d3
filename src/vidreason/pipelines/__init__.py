"""Pipelines: stages run in order, and a summary of their results."""
