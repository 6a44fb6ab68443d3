"""Tools for working on the package itself; not installed."""
