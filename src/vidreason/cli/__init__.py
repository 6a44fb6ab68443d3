"""The subcommands of ``vidreason``."""
