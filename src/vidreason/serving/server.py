"""Loads a model and serves it until a signal; what was accepted by then is still answered."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from vidreason.answering.exported import load_export
from vidreason.answering.loaded import LoadedModel, OpenedRun
from vidreason.config.finished_stage import find_stage
from vidreason.serving.app import make_app
from vidreason.serving.draining import DrainingServer
from vidreason.serving.engine import Engine
from vidreason.serving.guard import is_loopback, read_token
from vidreason.serving.limits import ServingOptions
from vidreason.serving.requests import About
from vidreason.serving.service import Service


@dataclass(frozen=True)
class Source:
    """The model that is served.

    Args:
        run: Run folder, or None.
        stage: Stage of the run; None is the one that it tested last.
        export: Exported folder, or None.
        name: Name of the model for clients; None is that of the folder.
    """

    run: Path | None = None
    stage: str | None = None
    export: Path | None = None
    name: str | None = None

    @property
    def folder(self) -> Path:
        """The run or exported folder."""
        folder = self.run or self.export
        assert folder is not None, "one of the two is given"
        return folder

    def load(self) -> LoadedModel:
        """Loads the model.

        Raises:
            ValueError: If the run has not finished, or the export is damaged.
        """
        if self.export is not None:
            return load_export(self.export)
        return OpenedRun.of(find_stage(self.folder, self.stage)).load()


@dataclass(frozen=True)
class Address:
    """The address and the token of the service.

    Args:
        host: Name or address.
        port: Port; 0 takes a free one.
        token_file: File with the token that clients have to send; needed for all but loopback addresses.

    Raises:
        ValueError: If another machine could call the service without a token.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token_file: Path | None = None
    token: str | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.token_file is None and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host}: other machines could call the service; give --token-file FILE, or keep 127.0.0.1"
            )
        object.__setattr__(self, "token", None if self.token_file is None else read_token(self.token_file))


def open_service(source: Source, options: ServingOptions) -> Service:
    """Loads a model as a service, which does not listen yet.

    Raises:
        ValueError: If the model cannot be loaded.
    """
    engine = Engine(source.load(), options.batch_size)
    folder = source.folder.resolve()
    return Service(engine, About.of(engine, source.name or folder.name, folder.stat().st_mtime), options)


def serve(source: Source, address: Address, options: ServingOptions) -> None:
    """Serves a model until SIGTERM or Ctrl-C.

    Raises:
        ValueError: If the model cannot be loaded.
        OSError: If the port is taken.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as listener:  # before the model is loaded, so that a taken port is told at once
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address.host, address.port))
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{address.host}:{address.port}") from error
        service = open_service(source, options)
        app = make_app(service, is_loopback(address.host), address.token)
        config = uvicorn.Config(app, http="h11", ws="none", log_level="warning", server_header=False, lifespan="on")
        host = f"[{address.host}]" if ":" in address.host else address.host
        print(f"answers: {service.engine.answers}", file=sys.stderr)
        print(f"serving {service.about.name} at http://{host}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        DrainingServer(config, service).run([listener])
