"""``vidreason serve``: a finished run as a service."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vidreason import exit_codes
from vidreason.config.options import CommandParser

_NEEDED = ("fastapi", "uvicorn", "python_multipart")


def main(argv: Sequence[str]) -> int:
    """Serves the model of a finished run or an exported folder until SIGTERM or Ctrl-C.

    Args:
        argv: Options of ``vidreason serve``.

    Returns:
        Exit status 0.

    Raises:
        ValueError: If an option is wrong, a package is missing, or the model cannot be loaded.
    """
    parser = CommandParser(
        prog="vidreason serve",
        description="Answer questions about clips over HTTP: POST /v1/decisions, /v1/systemone and /v1/classify.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, metavar="RUN", help="run folder of a pipeline or a stage")
    model.add_argument("--export", type=Path, metavar="DIR", help="folder of vidreason export")
    parser.add_argument("--stage", metavar="NAME", help="stage of the pipeline (default: what it tested last)")
    parser.add_argument("--name", metavar="NAME", help="name of the model for clients (default: that of the folder)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file with the token that clients must send")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="clips that are answered together")
    parser.add_argument("--waiting", type=int, default=64, metavar="N", help="requests in the service at most")
    parser.add_argument("--deadline", type=float, default=120.0, metavar="S", help="seconds until a request gets 503")
    parser.add_argument(
        "--own-question-only",
        action="store_true",
        help="refuse other questions; for them, fully fine-tuned or merged weights need their base in memory, too",
    )
    options = parser.parse_options(argv)
    if options.stage is not None and options.run is None:
        parser.error("--stage belongs to --run; an exported folder has one model")
    if not 0 <= options.port < 2**16:
        parser.error(f"--port must be from 0 to 65535, got {options.port}")
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install 'vidreason[serve]'")

    # Importing these takes seconds: mistakes in the options are reported before.
    from vidreason.serving.limits import ServingOptions
    from vidreason.serving.server import Address, Source, serve

    address = Address(options.host, options.port, options.token_file)
    limits = ServingOptions(batch_size=options.batch_size, waiting=options.waiting, deadline_s=options.deadline)
    source = Source(options.run, options.stage, options.export, options.name, not options.own_question_only)
    serve(source, address, limits)
    return exit_codes.OK
