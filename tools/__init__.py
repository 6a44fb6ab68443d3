"""Tools for the development of the package, which are not installed."""
