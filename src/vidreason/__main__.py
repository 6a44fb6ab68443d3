"""``python -m vidreason``, the same as the ``vidreason`` command."""

from vidreason.cli.main import run

if __name__ == "__main__":
    run()
