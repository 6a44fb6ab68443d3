"""``python -m vidreason``, the same as the ``vidreason`` command."""

import sys

from vidreason.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
