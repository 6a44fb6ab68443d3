"""Models that answer: loaded from a finished run or from an exported folder."""
