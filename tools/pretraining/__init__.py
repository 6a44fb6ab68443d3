"""Pretraining of the embedded base; it is run from the checkout and not installed."""
