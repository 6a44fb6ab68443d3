"""Exit statuses of the commands."""

OK = 0
ERROR = 1
"""The run failed."""
USAGE = 2
"""A mistake on the command line, in a config or in a table of the data."""
UNPARSED = 5
"""A stage stopped because none of its completions could be parsed."""
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
