"""The embedded data set of the demo: a porch in the view of a doorbell camera, rendered in NumPy."""
