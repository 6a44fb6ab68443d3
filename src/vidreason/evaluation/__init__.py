"""Evaluation of finished runs: which stage brings what, with intervals and comparisons between methods."""
