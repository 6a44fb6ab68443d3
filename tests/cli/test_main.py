import logging
import re
import subprocess
import sys
import time

import pytest

from vidreason.cli.main import COMMANDS, main, message_of, raised_by_user_code

HEAVY = ("torch", "lightning", "transformers", "numpy", "jsonargparse", "yaml")


def test_help_imports_nothing_heavy_and_is_instant():
    code = (
        "import sys; from vidreason.cli.main import main; status = main(['--help']); "
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    assert seconds < 1.0
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", done.stdout, flags=re.MULTILINE)


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_succeeds(argv, capsys):
    assert main(argv) == 0
    assert "usage: vidreason" in capsys.readouterr().out


def test_version_is_the_package_version(capsys):
    import vidreason

    assert main(["--version"]) == 0
    assert vidreason.__version__ in capsys.readouterr().out


def test_unknown_command_suggests_the_nearest(capsys):
    assert main(["piepline"]) == 2
    error = capsys.readouterr().err
    assert "'piepline'" in error
    assert "'pipeline'" in error
    assert error.count("\n") == 1


def test_current_folder_is_appended_once_and_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    main(["configs"])
    main(["configs"])
    assert sys.path.count(str(tmp_path)) == 1
    assert sys.path[-1] == str(tmp_path)


def test_an_optional_kernel_of_bitsandbytes_is_not_mentioned_and_its_other_warnings_are(capsys, caplog):
    main(["configs"])
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("something else is wrong")
    assert [record.getMessage() for record in caplog.records] == ["something else is wrong"]


def test_options_of_a_command_are_checked(capsys):
    assert main(["configs", "--cop", "x"]) == 2
    assert main(["configs", "--help"]) == 0


def _raise_from(source: str, filename: str) -> ValueError:
    try:
        exec(compile(source, filename, "exec"), {})
    except ValueError as error:
        return error
    raise AssertionError("the source raised nothing")


def test_own_errors_are_told_from_library_bugs(tmp_path):
    own = tmp_path / "clips.py"
    own.write_text("raise ValueError('row 3')")
    assert raised_by_user_code(_raise_from(own.read_text(), str(own)))
    assert not raised_by_user_code(_raise_from("import json; json.loads('{')", str(own)))
    assert not raised_by_user_code(ValueError("never raised"))


def test_worker_errors_are_unwrapped(tmp_path):
    own = tmp_path / "clips.py"
    own.write_text("")
    text = (
        "Caught DecodeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        f'  File "{__import__("json").__file__}", line 1, in fetch\n  File "{own}", line 4, in read\n'
        "vidreason.datamodules.clips.decoding.DecodeError: clip.mp4: no video stream\n"
    )
    assert message_of(ValueError(text)) == "clip.mp4: no video stream"
    assert raised_by_user_code(ValueError(text))
