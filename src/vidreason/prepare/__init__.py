"""From somebody's clips to the files that the commands read."""
