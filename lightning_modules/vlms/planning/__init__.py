"""Predicts tokens and memory of a model from its configuration, without weights."""
