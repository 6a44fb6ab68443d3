"""A cache of the embeddings that a frozen vision path computes."""
