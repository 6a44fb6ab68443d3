"""A decord that spins in C at files whose name says so, and reads no other."""

FAKE_DECORD = """
import os, re
from types import SimpleNamespace

logging = SimpleNamespace(set_level=lambda level: None, QUIET=0)


class DECORDError(Exception):
    pass


class VideoReader:
    def __init__(self, path, num_threads):
        if "spins" in os.path.realpath(path):
            re.match(r"(a|aa)+$", "a" * 100 + "b")  # in C, for longer than anyone waits
        raise DECORDError("not today")
"""
