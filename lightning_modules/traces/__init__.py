"""Texts that a model generates about clips: rationales, descriptions and reasoning traces."""
