"""Decisions about clips from scores or generated answers, their probabilities, and the metrics of a split."""
