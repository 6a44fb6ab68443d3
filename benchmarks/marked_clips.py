"""Copies of a clip that differ in content, so that nothing about them is known from before."""

from __future__ import annotations


def with_mark(content: bytes, mark: str) -> bytes:
    """Returns an mp4 file with an empty box at its end that holds a mark; players pass over it."""
    note = mark.encode()
    return content + (8 + len(note)).to_bytes(4, "big") + b"free" + note
