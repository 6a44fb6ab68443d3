"""Reading clips and labels from folders, tables and chat records that others have written."""
