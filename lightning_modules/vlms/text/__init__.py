"""Prompts and texts as token tensors."""
