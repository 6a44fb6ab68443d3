"""The config files and strategy overlays that pipelines name."""

from __future__ import annotations

import argparse
from pathlib import Path

from vidreason.config.command_files import check_section, check_yaml
from vidreason.config.files import PREFIX, find_config, shipped_folder
from vidreason.spelling import did_you_mean


def locate_config(name: str, option: str = "--config") -> Path:
    """Returns the path of a config file in the current folder or, failing that, among the shipped files.

    Args:
        name: The file.
        option: The option of a stage that takes it.

    Raises:
        ValueError: If it is in neither place, or not a file that the option takes.
    """
    try:
        check_section(option, name)
        path = find_config(name)
        if path is not None:
            check_yaml(path)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if path is None:
        raise ValueError(f"no file {name!r}, neither from {Path.cwd()} nor among the shipped configs")
    return path


def strategy_file(name: str) -> str:
    """Returns the file of a strategy: ``configs/strategy/qlora.yaml`` for ``qlora``; a file name is returned unchanged.

    Raises:
        ValueError: If there is no such file; the message lists the shipped ones.
    """
    path = name if name.endswith((".yaml", ".yml")) else f"{PREFIX}/strategy/{name}.yaml"
    if find_config(path) is None:
        shipped = sorted(p.stem for p in (shipped_folder() / "strategy").glob("*.yaml"))
        raise ValueError(
            f"no strategy {name!r} ({path}); shipped are {', '.join(shipped)}{did_you_mean(name, shipped, '; ')}"
        )
    return path
