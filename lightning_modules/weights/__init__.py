"""Trained weights: which are trained, where they come from, how they are sharded and exported."""
