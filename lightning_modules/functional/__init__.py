"""Pure functions on tensors; this package imports torch only."""
