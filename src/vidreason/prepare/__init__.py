"""``vidreason init``: from a user's clips to the files that all commands read."""
