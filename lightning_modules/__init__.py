"""The stages, the model families, and the functions and callbacks that they consist of."""
