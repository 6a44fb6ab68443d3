"""The inputs of a pipeline's stages: command lines, and fingerprints of everything that determines their artefacts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from vidreason import __version__
from vidreason.config.vlm_shorthand import shorthand_settings
from vidreason.pipelines.config_files import locate_config
from vidreason.pipelines.fingerprints import (
    fingerprint_artefact,
    fingerprint_config,
    fingerprint_embedded_weights,
    fingerprint_settings,
    named_values,
)
from vidreason.pipelines.spec import PipelineSpec
from vidreason.pipelines.stage import Reference, StageSpec
from vidreason.pipelines.state import changed_inputs
from vidreason.run_folder import ARTEFACT_FILES, CHECKPOINTS_FOLDER, LAST_CHECKPOINT, RunState, artefact_path

_ARTEFACT = "artefact"


class StageInputs:
    """The inputs of the stages of one pipeline in one run folder.

    Args:
        spec: The pipeline.
        run_dir: Its run folder.
        state: The state of the run; every method reads its current content.
        own_inputs: Fingerprints what the user's own classes of a command say that they read.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        run_dir: Path,
        state: RunState,
        own_inputs: Callable[[list[str]], dict[str, str]] = lambda argv: {},
    ) -> None:
        self.spec, self.run_dir, self.state, self.own_inputs = spec, run_dir, state, own_inputs

    def command_line(self, stage: StageSpec, folder: Path) -> list[str]:
        """Returns the arguments after ``vidreason`` that run a stage, resuming from a checkpoint if there is one."""
        argv: list[str] = [stage.command, "--config", stage.config]
        settings = {"run_dir": folder.as_posix(), **self._settings(stage)}
        argv += ["--config", stage.strategy] if stage.strategy is not None else []
        found = {key: self._resolve(references) for key, references in stage.inputs.items()}
        settings |= {key: artefact[1].as_posix() for key, artefact in found.items() if artefact is not None}
        settings |= {key: [self._one(ref)[1].as_posix() for ref in refs] for key, refs in stage.lists.items()}
        checkpoint = folder / CHECKPOINTS_FOLDER / LAST_CHECKPOINT
        if stage.command == "fit" and checkpoint.is_file():
            settings["ckpt_path"] = checkpoint.as_posix()
        for key, value in settings.items():
            text = value if isinstance(value, str) else json.dumps(value)
            # argparse would take a separate value that begins with a dash for an option
            argv += [f"--{key}={text}"] if text.startswith("-") else [f"--{key}", text]
        return argv

    def _settings(self, stage: StageSpec) -> dict[str, object]:
        """Returns the settings that are added to the config of a stage, except paths of artefacts."""
        spec = self.spec
        sections = {key: value for key, value in (("data", spec.data), ("vlm", spec.vlm)) if value is not None}
        return {**sections, "seed_everything": spec.seed, **spec.args, **stage.args}

    def given(self, stage: StageSpec) -> dict[str, str]:
        """Returns fingerprints of the inputs that the user controls: config, settings, data, base."""
        inputs = {"command": stage.command, "vidreason": __version__, "base": fingerprint_embedded_weights()}
        names = [name for name in (stage.config, stage.strategy) if name is not None]
        files, settings = [locate_config(name) for name in names], self._settings(stage)
        roots = [Path(value) for value in named_values("root", files, settings)]
        for file, name in zip(files, names, strict=True):
            inputs |= fingerprint_config(file, name, roots)
        inputs |= fingerprint_settings(shorthand_settings(self.spec.vlm))
        inputs |= fingerprint_settings(settings, roots=roots)
        if any(key.startswith("code ") for key in inputs):
            inputs |= self.own_inputs(self.command_line(stage, self.run_dir / self.spec.folder(stage.name)))
        return inputs

    def as_before(self, stage: StageSpec, before: Mapping[str, str]) -> bool:
        """Returns whether the inputs that the user controls are unchanged since ``before``."""
        settled = {key: value for key, value in before.items() if not key.startswith(f"{_ARTEFACT} ")}
        return not changed_inputs(settled, self.given(stage))

    def fingerprints(self, stage: StageSpec) -> dict[str, str]:
        """Returns fingerprints of all inputs, including the artefacts of earlier stages."""
        inputs = self.given(stage)
        for key, references in stage.inputs.items():
            found = self._resolve(references)
            told = "none" if found is None else f"{found[0]} {fingerprint_artefact(found[1])}"
            inputs[f"{_ARTEFACT} {key}"] = told
        for key, refs in stage.lists.items():
            told = ", ".join(f"{ref} {fingerprint_artefact(path)}" for ref, path in map(self._one, refs))
            inputs[f"{_ARTEFACT} {key}"] = told
        return inputs

    def _one(self, reference: Reference) -> tuple[Reference, Path]:
        """Returns an artefact of a stage that is never skipped, and its present or future path."""
        found = self._resolve((reference,))
        assert found is not None
        return found

    def _resolve(self, references: tuple[Reference | None, ...]) -> tuple[Reference, Path] | None:
        """Returns the first alternative whose stage was not skipped, and the present or future path of its artefact.

        None stands for a setting that is left out.
        """
        for reference in references:
            if reference is None:
                return None
            record = self.state.stages.get(reference.stage)
            if record is not None and record.status == "skipped":
                continue
            folder = self.run_dir / (record.folder if record else self.spec.folder(reference.stage))
            path = artefact_path(folder, reference.artefact) or folder / ARTEFACT_FILES[reference.artefact][0]
            return reference, Path(os.path.normpath(path))  # drops the ".." of a stage taken from another run
        raise AssertionError("the last alternative is never skipped")  # checked by read_pipeline
