"""Reading of clips and labels from folders, tables and chat records in common formats."""
