"""The embedded world of the demo: a porch seen by a doorbell camera, rendered in NumPy."""
