"""Pretraining of the embedded base: run from the checkout, not installed."""
