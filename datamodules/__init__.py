"""Files to batches; no weights."""
