"""Texts that a model writes about clips: rationales, descriptions and reasoning traces."""
