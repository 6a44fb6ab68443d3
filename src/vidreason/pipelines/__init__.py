"""Stages in order, and what they came to."""
