"""What the stages of a pipeline are given: command lines, and fingerprints of all that decides what they write."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from vidreason import __version__
from vidreason.config.vlm_shorthand import shorthand_settings
from vidreason.pipelines.fingerprints import (
    fingerprint_artefact,
    fingerprint_config,
    fingerprint_embedded_weights,
    fingerprint_settings,
)
from vidreason.pipelines.spec import PipelineSpec, Reference, StageSpec, locate_config
from vidreason.pipelines.state import changed_inputs
from vidreason.run_folder import ARTEFACT_FILES, CHECKPOINTS_FOLDER, LAST_CHECKPOINT, RunState, artefact_path

_ARTEFACT = "artefact"


class StageInputs:
    """What the stages of one pipeline are given in one run folder.

    Args:
        spec: The pipeline.
        run_dir: Its run folder.
        state: Which stages are finished, and where; read anew at every call.
    """

    def __init__(self, spec: PipelineSpec, run_dir: Path, state: RunState) -> None:
        self.spec, self.run_dir, self.state = spec, run_dir, state

    def command_line(self, stage: StageSpec, folder: Path) -> list[str]:
        """The stage as the arguments of an ordinary ``vidreason`` call."""
        argv: list[str] = [stage.command, "--config", stage.config]
        settings = {"run_dir": folder.as_posix(), **self._settings(stage)}
        argv += ["--config", stage.strategy] if stage.strategy is not None else []
        settings |= {key: self._resolve(refs)[1].as_posix() for key, refs in stage.inputs.items()}
        checkpoint = folder / CHECKPOINTS_FOLDER / LAST_CHECKPOINT
        if stage.command == "fit" and checkpoint.is_file():
            settings["ckpt_path"] = checkpoint.as_posix()
        for key, value in settings.items():
            text = value if isinstance(value, str) else json.dumps(value)
            argv += [f"--{key}={text}"] if text.startswith("-") else [f"--{key}", text]
        return argv

    def _settings(self, stage: StageSpec) -> dict[str, object]:
        """Everything laid on top of the stage's config but for paths of artefacts."""
        spec = self.spec
        sections = {key: value for key, value in (("data", spec.data), ("vlm", spec.vlm)) if value is not None}
        return {**sections, "seed_everything": spec.seed, **spec.args, **stage.args}

    def given(self, stage: StageSpec) -> dict[str, str]:
        """Fingerprints of what the user gives: config, settings, data, base."""
        inputs = {"command": stage.command, "vidreason": __version__, "base": fingerprint_embedded_weights()}
        inputs |= fingerprint_config(locate_config(stage.config), stage.config)
        inputs |= fingerprint_settings(shorthand_settings(self.spec.vlm))
        if stage.strategy is not None:
            inputs |= fingerprint_config(locate_config(stage.strategy), stage.strategy)
        return inputs | fingerprint_settings(self._settings(stage))

    def as_before(self, stage: StageSpec, before: Mapping[str, str]) -> bool:
        """Whether the user gives what was given before; artefacts of other stages aside."""
        settled = {key: value for key, value in before.items() if not key.startswith(f"{_ARTEFACT} ")}
        return not changed_inputs(settled, self.given(stage))

    def fingerprints(self, stage: StageSpec) -> dict[str, str]:
        """Fingerprints of everything that decides what the stage writes."""
        inputs = self.given(stage)
        for key, references in stage.inputs.items():
            reference, path = self._resolve(references)
            inputs[f"{_ARTEFACT} {key}"] = f"{reference} {fingerprint_artefact(path)}"
        return inputs

    def _resolve(self, references: tuple[Reference, ...]) -> tuple[Reference, Path]:
        """The first of the alternatives that was not skipped, and where it lies or will lie."""
        for reference in references:
            record = self.state.stages.get(reference.stage)
            if record is not None and record.status == "skipped":
                continue
            folder = self.run_dir / (record.folder if record else self.spec.folder(reference.stage))
            path = artefact_path(folder, reference.artefact) or folder / ARTEFACT_FILES[reference.artefact][0]
            return reference, Path(os.path.normpath(path))
        raise AssertionError("the last alternative is never skipped")  # read_pipeline sees to it
