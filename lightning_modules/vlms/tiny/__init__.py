"""TinyVLM, the embedded default: a small video VLM in the hub's own format."""
