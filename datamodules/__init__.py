"""Data modules: from files to batches. Nothing here holds weights."""
