"""The options of ``vidreason serve``, and what it says without its extra."""

import importlib.util
import sys
from pathlib import Path

import pytest

from vidreason.cli import serve
from vidreason.cli.main import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --run --export is required"),
        (["--run", "x", "--export", "y"], "not allowed with argument"),
        (["--export", "x", "--stage", "y"], "--stage belongs to --run"),
        (["--run", "x", "--port", "70000"], "--port must be from 0 to 65535"),
        (["--run", "x", "--host", "0.0.0.0"], "give --token-file FILE, or keep 127.0.0.1"),
        (["--run", "x", "--waiting", "0"], "waiting must be positive"),
        (["--run", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", *options, *(() if "--port" in options else ("--port", "0"))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def find(name: str) -> object:
        return None if name == "fastapi" else importlib.util.find_spec(name)

    monkeypatch.setattr(serve, "find_spec", find)
    assert main(["serve", "--run", "x"]) == 2
    assert capsys.readouterr().err == "error: serve needs fastapi: pip install 'vidreason[serve]'\n"


def test_other_commands_do_not_import_the_service():
    """Every import of its extra is in its own package, which only its command imports, when it is called."""
    root = Path(sys.modules["vidreason"].__file__ or "").parent
    for path in root.rglob("*.py"):
        if path.parent.name != "serving" and path.name != "serve.py":
            assert "vidreason.serving" not in path.read_text(encoding="utf-8"), path
            assert "fastapi" not in path.read_text(encoding="utf-8"), path
