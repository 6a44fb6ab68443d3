"""From scores or generated answers to a decision about a clip, its probabilities and the metrics over a split."""
