"""Runs the stages of a pipeline as ordinary commands and keeps account of them in the run folder."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from vidreason import __version__
from vidreason.callbacks.time_left import BEHIND, Behind, pipeline_left
from vidreason.cli.fingerprints import (
    fingerprint_artefact,
    fingerprint_config,
    fingerprint_embedded_weights,
    fingerprint_settings,
)
from vidreason.cli.pipeline_commands import COLD_POLICY_STATUS, INTERRUPTED_STATUS, USAGE_STATUS, Commands
from vidreason.cli.pipeline_spec import ARTEFACT_FILES, PipelineSpec, Reference, StageSpec, locate_config
from vidreason.cli.pipeline_state import (
    NOTHING,
    RunState,
    StageRecord,
    artefact_path,
    changed_inputs,
    find_taken_stage,
    seconds_behind,
    seconds_taken,
)
from vidreason.cli.summary import write_summary
from vidreason.cli.usage import cpu_seconds, gpus_used, reset_gpu_peak
from vidreason.cli.vlm_shorthand import shorthand_settings
from vidreason.datamodules.whole_files import write_text

_ARTEFACT = "artefact"


class PipelineRun:
    """One pipeline in one run folder."""

    def __init__(
        self,
        spec: PipelineSpec,
        run_dir: Path,
        commands: Commands,
        again: str,
        use: Mapping[str, Path] | None = None,
        later: Behind = NOTHING,
    ) -> None:
        """Loads the folder's state.

        Args:
            spec: The stages, with overrides laid on top.
            run_dir: The run folder, new or from an earlier call.
            commands: How to run a stage.
            again: The command line that goes on with this run, for messages.
            use: Stage name to the folder of another run in which it is finished.
            later: What follows this pipeline, where it is one of several.

        Raises:
            ValueError: The folder's state cannot be read or belongs to another pipeline; a stage in ``use`` is unknown.
        """
        self.spec, self.run_dir, self.commands, self.again = spec, run_dir, commands, again
        self.use = {spec.stage(name).name: folder for name, folder in (use or {}).items()}
        self.state = RunState.load(run_dir) or RunState(spec.name)
        self.later, self.took = later, seconds_taken(self.state)
        if self.state.pipeline != spec.name:
            raise ValueError(
                f"--run_dir {run_dir} holds a run of pipeline {self.state.pipeline!r}, not of {spec.name!r}; "
                "choose another folder"
            )

    def run(self, until: str | None = None) -> int:
        """Runs every stage that is not finished on its present inputs.

        Args:
            until: Name of the last stage to run; None runs all.

        Returns:
            0, or the exit status of the stage that failed.

        Raises:
            ValueError: ``until`` is no stage; a stage of ``--use`` does not fit; a stage did not write its artefact.
        """
        last = self.spec.stage(until).name if until else self.spec.stages[-1].name
        write_text(self.run_dir / "pipeline.yaml", self.spec.as_yaml())
        if not self._check(last):
            return USAGE_STATUS
        for number, stage in enumerate(self.spec.stages, 1):
            title = f"[{number}/{len(self.spec.stages)}] {stage.name}"
            following = self._until(last)[number:]
            self.behind = seconds_behind([s.name for s in following if s.name not in self.use], self.took) + self.later
            status = self._take(stage, title) if stage.name in self.use else self._advance(stage, title)
            if status != 0:
                return status
            if stage.command == "test":
                write_summary(self.run_dir, self.spec, self.state)
            if stage.name == last:
                break
        return 0

    def _check(self, last: str) -> bool:
        """Builds every stage that will run once, without weights: a typo shows now and not hours later."""
        for stage in self._until(last):
            record = self.state.stages.get(stage.name)
            known = (
                record is not None and record.done and not changed_inputs(_settled(record.inputs), self._given(stage))
            )
            if known or stage.name in self.use:
                continue
            error = self.commands.check(self._command_line(stage, self.run_dir / self.spec.folder(stage.name)))
            if error is not None:
                print(f"error: stage {stage.name}: {error}", file=sys.stderr)
                return False
        return True

    def _until(self, last: str) -> tuple[StageSpec, ...]:
        """The stages up to and with ``last``."""
        return self.spec.stages[: [stage.name for stage in self.spec.stages].index(last) + 1]

    def _take(self, stage: StageSpec, title: str) -> int:
        """Takes a finished stage from another run, if it was made on the inputs that it would have here."""
        option = f"--use {stage.name}={self.use[stage.name]}"
        folder, found = find_taken_stage(stage.name, self.use[stage.name])
        inputs = self._inputs(stage)
        differs = changed_inputs(found.inputs, inputs)
        if differs:
            raise ValueError(f"{option}: that run's stage was made on other inputs: {', '.join(differs)}")
        path = artefact_path(folder, stage.artefact)
        if path is None:
            raise ValueError(f"{option}: {folder} holds no {stage.artefact}")
        print(f"{title}: taken from {folder}")
        self.state.stages[stage.name] = StageRecord(
            status="finished",
            folder=os.path.relpath(folder, self.run_dir),
            inputs=inputs,
            command=found.command,
            artefact_sha=fingerprint_artefact(path),
            taken=True,
            note=f"taken from {folder}",
            wall_seconds=found.wall_seconds,
            cpu_seconds=found.cpu_seconds,
            gpu_seconds=found.gpu_seconds,
        )
        self._count_train_clips(stage, found)
        self.state.save(self.run_dir)
        return 0

    def _advance(self, stage: StageSpec, title: str) -> int:
        """Skips, resumes or starts a stage."""
        inputs = self._inputs(stage)
        folder = self.run_dir / self.spec.folder(stage.name)
        record = self.state.stages.get(stage.name)
        if record is not None and record.taken:
            record = None  # was another run's; this call asks for one of its own
        changed = [] if record is None else changed_inputs(record.inputs, inputs)
        if record is not None and (changed or record.folder != self.spec.folder(stage.name)):
            print(f"{title}: runs again, changed: {', '.join(changed) or 'its place in the pipeline'}")
            record = None
        if record is not None and record.done:
            path = artefact_path(folder, stage.artefact)
            if record.status == "skipped":
                print(f"{title}: {record.note}")
                return 0
            if path is not None:
                edited = fingerprint_artefact(path) != record.artefact_sha
                print(f"{title}: finished, inputs unchanged" + (f" ({path} was edited since; kept)" if edited else ""))
                return 0
            print(f"{title}: runs again, its {stage.artefact} is gone from {folder}")
            record = None
        if record is None:
            _put_aside(folder)
            record = StageRecord("running", self.spec.folder(stage.name), inputs)
        else:
            print(f"{title}: goes on where it was {record.status}")
        self.state.stages[stage.name] = record
        return self._execute(stage, record, title)

    def _execute(self, stage: StageSpec, record: StageRecord, title: str) -> int:
        folder = self.run_dir / record.folder
        record.command = self._command_line(stage, folder)
        line = shlex.join(["vidreason", *record.command])
        print(f"{title}{self._left(stage)}\n  $ {line}", flush=True)
        write_text(folder / "command.txt", line + "\n")
        record.status = "running"
        self.state.save(self.run_dir)
        status = self._timed(record, title)

        if status == COLD_POLICY_STATUS and stage.on_cold_policy == "skip":
            record.status = "skipped"
            record.note = (
                "ended without an adapter: no completion could be parsed; the run goes on from the stage before"
            )
            print(f"{title}: {record.note}")
        elif status != 0:
            record.status = "interrupted" if status == INTERRUPTED_STATUS else "failed"
            self.state.save(self.run_dir)
            self._say_how_to_go_on(title, f"{record.status} (exit status {status})")
            return status
        else:
            self._finish(stage, record, folder)
        self.state.save(self.run_dir)
        return 0

    def _left(self, stage: StageSpec) -> str:
        """How long this stage and what follows will take, where an earlier run of this folder tells."""
        total = seconds_behind([stage.name], self.took) + self.behind
        return f"  (time left for all: {pipeline_left(0, total)})" if total.seconds > 0 else ""

    def _finish(self, stage: StageSpec, record: StageRecord, folder: Path) -> None:
        path = artefact_path(folder, stage.artefact)
        if path is None:
            record.status = "failed"
            self.state.save(self.run_dir)
            raise ValueError(f"stage {stage.name} ended without an error but wrote no {stage.artefact} into {folder}")
        record.status, record.artefact_sha = "finished", fingerprint_artefact(path)
        self._count_train_clips(stage, record)

    def _count_train_clips(self, stage: StageSpec, record: StageRecord) -> None:
        if stage.command == "fit":
            self.state.train_clips = self.commands.count_train_clips(record.command)

    def _say_how_to_go_on(self, title: str, what: str) -> None:
        print(f"{title}: {what}. What is finished is kept; go on with\n  $ {self.again}", file=sys.stderr, flush=True)

    def _timed(self, record: StageRecord, title: str) -> int:
        """Runs the stage's command and adds what it took to the record, however it ends."""
        cpu, wall = cpu_seconds(), time.monotonic()
        reset_gpu_peak()
        record.status = "failed"  # stands if the command leaves by an exception
        status = None
        try:
            token = BEHIND.set(self.behind)
            try:
                status = self.commands.run(record.command)
            finally:
                BEHIND.reset(token)
        except KeyboardInterrupt:
            status = INTERRUPTED_STATUS
        finally:
            if status is None:
                self._say_how_to_go_on(title, "failed")
            elapsed = time.monotonic() - wall
            record.wall_seconds += elapsed
            record.cpu_seconds += cpu_seconds() - cpu
            record.gpu_seconds += elapsed * gpus_used()
            self.state.save(self.run_dir)
        return status

    def _command_line(self, stage: StageSpec, folder: Path) -> list[str]:
        """The stage as the arguments of an ordinary ``vidreason`` call."""
        argv: list[str] = [stage.command, "--config", stage.config]
        settings = {"run_dir": folder.as_posix(), **self._settings(stage)}
        for section in ("data", "vlm"):
            if section in settings and stage.strategy is not None:  # the overlay goes on top of them
                argv += [f"--{section}", str(settings.pop(section))]
        argv += ["--config", stage.strategy] if stage.strategy is not None else []
        settings |= {key: self._resolve(refs)[1].as_posix() for key, refs in stage.inputs.items()}
        checkpoint = folder / "checkpoints" / "last.ckpt"
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

    def _given(self, stage: StageSpec) -> dict[str, str]:
        """Fingerprints of what the user decides: config, settings, data, base."""
        inputs = {"command": stage.command, "vidreason": __version__, "base": fingerprint_embedded_weights()}
        inputs |= fingerprint_config(locate_config(stage.config), stage.config)
        inputs |= fingerprint_settings(shorthand_settings(self.spec.vlm))
        if stage.strategy is not None:
            inputs |= fingerprint_config(locate_config(stage.strategy), stage.strategy)
        return inputs | fingerprint_settings(self._settings(stage))

    def _inputs(self, stage: StageSpec) -> dict[str, str]:
        """Fingerprints of everything that decides what the stage writes."""
        inputs = self._given(stage)
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


def _settled(inputs: Mapping[str, str]) -> dict[str, str]:
    """Inputs but for artefacts of other stages."""
    return {key: value for key, value in inputs.items() if not key.startswith(f"{_ARTEFACT} ")}


def _put_aside(folder: Path) -> None:
    """Keeps the last version of a stage folder as ``NAME.old``."""
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
