"""Trained weights: trainable parameters, origin of weights, and export for the next stage."""
