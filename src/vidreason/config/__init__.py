"""From a command line to a trainer, a stage and its data module."""
