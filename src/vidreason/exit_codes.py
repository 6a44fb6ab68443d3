"""Exit statuses of the commands."""

OK = 0
ERROR = 1
"""The run failed"""
USAGE = 2
"""A mistake on the command line, in a config or in the data's tables"""
UNPARSED = 5
"""A stage gave up because no completion parses"""
INTERRUPTED = 130
