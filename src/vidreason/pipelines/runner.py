"""Runs the stages of a pipeline as ordinary commands and records their state in the run folder."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from vidreason import exit_codes
from vidreason.config.machine import cpu_seconds, gpus_used, reset_gpu_peak
from vidreason.datamodules.atomic_files import write_text
from vidreason.pipelines.commands import Commands
from vidreason.pipelines.fingerprints import fingerprint_artefact
from vidreason.pipelines.inputs import StageInputs
from vidreason.pipelines.spec import PipelineSpec
from vidreason.pipelines.stage import StageSpec
from vidreason.pipelines.state import changed_inputs, find_taken_stage, save_state, stage_notes, text_faults
from vidreason.pipelines.summary import write_summary
from vidreason.run_folder import COMMAND_FILE, PIPELINE_FILE, RunState, StageRecord, artefact_path
from vidreason.run_lock import lock_run_folder


class PipelineRun:
    """One pipeline in one run folder."""

    def __init__(
        self,
        spec: PipelineSpec,
        run_dir: Path,
        commands: Commands,
        again: str,
        use: Mapping[str, Path] | None = None,
        until: str | None = None,
    ) -> None:
        """Loads the state of the run folder.

        Args:
            spec: The pipeline, including overrides.
            run_dir: The run folder, new or from an earlier call.
            commands: The commands that stages run.
            again: The command line that continues this run, for messages.
            use: Stage name to the folder of another run that has finished it.
            until: Name of the last stage to run; None runs all.

        Raises:
            ValueError: If the state cannot be read or belongs to another pipeline, or a stage is unknown.
        """
        self.spec, self.run_dir, self.commands, self.again = spec, run_dir, commands, again
        self.use = {spec.stage(name).name: folder for name, folder in (use or {}).items()}
        self.state = RunState.load(run_dir) or RunState(spec.name)
        for name in [name for name, record in self.state.stages.items() if record.left_out]:
            del self.state.stages[name]  # decided anew, since the texts may be others
        self.inputs = StageInputs(spec, run_dir, self.state, commands.own_inputs)
        names = [stage.name for stage in spec.stages]
        self.stages = spec.stages[: names.index(spec.stage(until).name) + 1] if until else spec.stages
        if self.state.pipeline != spec.name:
            raise ValueError(
                f"--run_dir {run_dir} holds a run of pipeline {self.state.pipeline!r}, not of {spec.name!r}; "
                "choose another folder"
            )

    def prepare(self) -> bool:
        """Builds every stage that may run, without weights, so that a typo is found now and not hours later.

        Returns:
            False if there is a mistake, which has been printed.
        """
        profiles: dict[str | None, list[str]] = {}
        for stage in self.stages:
            record = self.state.stages.get(stage.name)
            known = record is not None and record.done and self.inputs.as_before(stage, record.inputs)
            if known or stage.name in self.use:
                continue
            line = self.inputs.command_line(stage, self.run_dir / self.spec.folder(stage.name))
            error = self.commands.check(line)
            if error is not None:
                print(f"error: stage {stage.name}: {error}", file=sys.stderr)
                return False
            profiles.setdefault(self.commands.profile(line), []).append(stage.name)
        for profile, names in profiles.items():
            if profile is not None:
                which = "of all stages" if len(profiles) == 1 else f"of {', '.join(names)}"
                print(f"settings {which}: {profile} (docs/budgets.md), printed by each as it starts", flush=True)
        return True

    def run(self, summarise: bool = True) -> int:
        """Runs every stage that has not finished with its current inputs, while no other process writes there.

        Args:
            summarise: Whether to write and print the summary behind each test stage.

        Returns:
            0, or the exit status of the stage that failed.

        Raises:
            ValueError: If a stage of ``use`` has other inputs, or a stage did not write its artefact.
        """
        with lock_run_folder(self.run_dir):
            return self._run_locked(summarise)

    def _run_locked(self, summarise: bool) -> int:
        write_text(self.run_dir / PIPELINE_FILE, self.spec.as_yaml())
        try:
            if not self.prepare():
                return exit_codes.USAGE
        except KeyboardInterrupt:
            self._print_how_to_continue("preparing", "interrupted")
            return exit_codes.INTERRUPTED
        for number, stage in enumerate(self.stages, 1):
            title = f"[{number}/{len(self.spec.stages)}] {stage.name}"
            if self._leaves_out(stage, title):
                continue
            status = self._take(stage, title) if stage.name in self.use else self._advance(stage, title)
            if status != 0:
                return status
            if stage.command == "test" and summarise:
                write_summary(self.run_dir, self.spec, self.state)
        return 0

    def _leaves_out(self, stage: StageSpec, title: str) -> bool:
        """Returns whether the condition of a stage does not hold; the stage is then recorded as skipped."""
        when = stage.when
        record = None if when is None else self.state.stages.get(when.stage)
        if when is None or record is None:
            return False
        language = not text_faults(self.run_dir / record.folder)
        if language == when.language:
            return False
        print(f"{title}: left out, since the texts of {when.stage} are {'' if language else 'no '}language", flush=True)
        self.state.stages[stage.name] = StageRecord("skipped", self.spec.folder(stage.name), {})
        save_state(self.state, self.run_dir)
        return True

    def _take(self, stage: StageSpec, title: str) -> int:
        """Records a finished stage of another run in place of running it.

        Raises:
            ValueError: If it had other inputs there than it would have here.
        """
        option = f"--use {stage.name}={self.use[stage.name]}"
        folder, found = find_taken_stage(stage.name, self.use[stage.name])
        inputs = self.inputs.fingerprints(stage)
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
            note="; ".join(filter(None, (f"taken from {folder}", stage_notes(folder)))),
            wall_seconds=found.wall_seconds,
            cpu_seconds=found.cpu_seconds,
            gpu_seconds=found.gpu_seconds,
        )
        self._count_train_clips(stage, found)
        save_state(self.state, self.run_dir)
        return 0

    def _advance(self, stage: StageSpec, title: str) -> int:
        """Skips, resumes or starts a stage; returns its exit status."""
        inputs = self.inputs.fingerprints(stage)
        folder = self.run_dir / self.spec.folder(stage.name)
        record = self.state.stages.get(stage.name)
        if record is not None and record.taken:
            record = None  # taken from another run by an earlier call; this one runs it itself
        changed = [] if record is None else changed_inputs(record.inputs, inputs, prove=record.done)
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
                said = [record.note] * bool(record.note) + [f"{path} was edited since; kept"] * edited
                print("; ".join([f"{title}: finished, inputs unchanged", *said]))
                return 0
            print(f"{title}: runs again, its {stage.artefact} is gone from {folder}")
            record = None
        if record is None:
            _move_aside(folder)
            record = StageRecord("running", self.spec.folder(stage.name), inputs)
        else:
            print(f"{title}: goes on where it was {record.status}")
        self.state.stages[stage.name] = record
        return self._execute(stage, record, title)

    def _execute(self, stage: StageSpec, record: StageRecord, title: str) -> int:
        """Runs a stage, records how it ended and returns its exit status."""
        folder = self.run_dir / record.folder
        record.command = self.inputs.command_line(stage, folder)
        line = shlex.join(["vidreason", *record.command])
        print(f"{title}\n  $ {line}", flush=True)
        write_text(folder / COMMAND_FILE, line + "\n")
        record.status = "running"  # stays in state.json if the process is killed
        save_state(self.state, self.run_dir)
        status = self._timed(record, title)

        if status == exit_codes.UNPARSED and stage.on_unparsed == "skip":
            record.status = "skipped"
            record.note = (
                "ended without an adapter: no completion could be parsed; the run goes on from the stage before"
            )
            print(f"{title}: {record.note}")
        elif status != 0:
            record.status = "interrupted" if status == exit_codes.INTERRUPTED else "failed"
            save_state(self.state, self.run_dir)
            self._print_how_to_continue(title, f"{record.status} (exit status {status})")
            return status
        else:
            self._finish(stage, record, folder)
        save_state(self.state, self.run_dir)
        return 0

    def _finish(self, stage: StageSpec, record: StageRecord, folder: Path) -> None:
        path = artefact_path(folder, stage.artefact)
        if path is None:
            record.status = "failed"
            save_state(self.state, self.run_dir)
            raise ValueError(f"stage {stage.name} ended without an error but wrote no {stage.artefact} into {folder}")
        record.status, record.artefact_sha = "finished", fingerprint_artefact(path)
        record.note = stage_notes(folder)
        self._count_train_clips(stage, record)

    def _count_train_clips(self, stage: StageSpec, record: StageRecord) -> None:
        if stage.command == "fit":
            self.state.train_clips = self.commands.train_clips(record.command)

    def _print_how_to_continue(self, title: str, what: str) -> None:
        print(f"{title}: {what}. What is finished is kept; go on with\n  $ {self.again}", file=sys.stderr, flush=True)

    def _timed(self, record: StageRecord, title: str) -> int:
        """Runs the command of a stage and adds its times to the record, even if it raises; returns its exit status."""
        cpu, wall = cpu_seconds(), time.monotonic()
        reset_gpu_peak()
        record.status = "failed"  # stands if the command leaves by an exception
        status = None
        try:
            status = self.commands.run(record.command)
        except KeyboardInterrupt:
            status = exit_codes.INTERRUPTED
        finally:
            if status is None:
                self._print_how_to_continue(title, "failed")
            elapsed = time.monotonic() - wall
            record.wall_seconds += elapsed
            record.cpu_seconds += cpu_seconds() - cpu
            record.gpu_seconds += elapsed * gpus_used()  # allocated GPU time, not utilisation
            save_state(self.state, self.run_dir)
        return status


def _move_aside(folder: Path) -> None:
    """Renames a stage folder to ``NAME.old``, replacing an earlier one."""
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
