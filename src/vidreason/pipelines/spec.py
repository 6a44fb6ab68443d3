"""The definition of a pipeline: stages in order, each an ordinary command, and the artefacts passed between them.

A pipeline file lists its stages. A stage has a command, a config, settings that override it (``args``) and artefacts of
earlier stages (``inputs``, written ``"{stage.artefact}"``, or ``"{grpo.adapter|sft_cold_start.adapter}"`` for the first
of several that exists). The command determines which artefact a stage writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import yaml

from vidreason.config.command_files import PIPELINE_CONFIG
from vidreason.config.moved_keys import PIPELINE_MOVED, explain_moved
from vidreason.pipelines.config_files import locate_config, strategy_file
from vidreason.pipelines.fingerprints import read_yaml
from vidreason.pipelines.stage import ARTEFACT_OF, Command, Condition, Reference, StageSpec
from vidreason.run_folder import STAGES_FOLDER
from vidreason.spelling import did_you_mean

SECTIONS = ("data", "vlm", "model", "trainer", "checkpoint", "optimizer", "lr_scheduler", "seed_everything")

_STAGE_KEYS = ("name", "command", "config", "strategy", "args", "inputs", "on_unparsed", "when", "cross_fit")
_PIPELINE_KEYS = ("name", "description", "needs", "data", "vlm", "strategy", "seed", "folds", "args", "stages")
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_REFERENCE = re.compile(r"\{([^{}]+)\}")
_CONDITION = re.compile(r"(not )?(\w+)\.language")
_NONE = "none"


@dataclass(frozen=True)
class PipelineSpec:
    """A pipeline as read from its file, with the overrides of the command line."""

    name: str
    description: str
    stages: tuple[StageSpec, ...]
    source: str
    """The file that it was read from, for messages."""
    needs: str = ""
    """Required clips and model, in one line."""
    data: str | None = None
    """File of the data section of every stage."""
    vlm: str | None = None
    """Section file, hub id or folder of the model of every stage."""
    seed: int = 0
    args: Mapping[str, object] = field(default_factory=dict)
    """Dotted settings of every stage."""
    folds: int = 0
    """Number of folds of train for cross-fitted traces (``cross_fitting.py``); 0 is none."""
    as_written: PipelineSpec | None = None
    """The pipeline without the stages that ``folds`` has added; None if none were added."""

    def __post_init__(self) -> None:
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"{self.source}: folds must be at least 2, or 0 for none, got {self.folds}")

    def stage(self, name: str) -> StageSpec:
        """Returns the stage called ``name`` or ``NN_name``.

        Raises:
            ValueError: If there is no such stage.
        """
        plain = re.sub(r"^\d\d_", "", name)
        for number, stage in enumerate(self.stages, 1):
            if name in (stage.name, f"{number:02d}_{stage.name}"):
                return stage
        raise ValueError(f"{self.source}: no stage {name!r}{did_you_mean(plain, [s.name for s in self.stages], '; ')}")

    def folder(self, name: str) -> str:
        """Returns the folder of a stage within the run folder (``stages/03_grpo``)."""
        number = [stage.name for stage in self.stages].index(name) + 1
        return f"{STAGES_FOLDER}/{number:02d}_{name}"

    def with_strategy(self, strategy: str, stage: str | None = None) -> PipelineSpec:
        """Returns a copy with another strategy overlay for one stage, or for every stage.

        Raises:
            ValueError: If there is no such stage or overlay.
        """
        path, chosen = strategy_file(strategy), None if stage is None else self.stage(stage)
        stages = tuple(replace(s, strategy=path) if chosen in (None, s) else s for s in self.stages)
        return replace(self, stages=stages)

    def with_overrides(self, overrides: Mapping[str, object]) -> PipelineSpec:
        """Returns a copy with the settings ``stage.dotted.key`` (one stage) and ``section.dotted.key`` (every stage).

        Raises:
            ValueError: If a key begins with neither a stage nor a section, or sets an input.
        """
        everywhere = dict(self.args)
        changed = {stage.name: dict(stage.args) for stage in self.stages}
        names = [stage.name for stage in self.stages]
        for key, value in overrides.items():
            head, _, rest = key.partition(".")
            if head in SECTIONS:
                everywhere[key] = value
                continue
            if not rest or re.sub(r"^\d\d_", "", head) not in names:
                raise ValueError(
                    f"--{key}: begins with neither a stage of {self.source} ({', '.join(names)}) nor a section "
                    f"({', '.join(SECTIONS)}){did_you_mean(head, [*names, *SECTIONS], '; ')}"
                )
            stage = self.stage(head)
            if rest in stage.inputs:
                raise ValueError(
                    f"--{key}: comes from {' or '.join(map(str, filter(None, stage.inputs[rest])))} in {self.source}; "
                    f"take a finished stage with --use {str(stage.inputs[rest][0]).partition('.')[0]}=FOLDER instead"
                )
            changed[stage.name][rest] = value
        stages = tuple(replace(stage, args=changed[stage.name]) for stage in self.stages)
        return replace(self, stages=stages, args=everywhere)

    def as_yaml(self) -> str:
        """Returns the pipeline as the text of a pipeline file that can be run."""
        if self.as_written is not None:
            return self.as_written.as_yaml()
        stages: list[dict[str, object]] = []
        for stage in self.stages:
            row: dict[str, object] = {"name": stage.name, "command": stage.command, "config": stage.config}
            if stage.strategy is not None:
                row["strategy"] = stage.strategy
            if stage.args:
                row["args"] = dict(stage.args)
            if stage.inputs:
                row["inputs"] = {
                    key: "{" + "|".join(str(ref or _NONE) for ref in refs) + "}" for key, refs in stage.inputs.items()
                }
            if stage.on_unparsed != "stop":
                row["on_unparsed"] = stage.on_unparsed
            if stage.when is not None:
                row["when"] = str(stage.when)
            if not stage.cross_fit:
                row["cross_fit"] = False
            stages.append(row)
        top: dict[str, object] = {"name": self.name, "description": self.description, "seed": self.seed}
        top |= {key: value for key in ("needs", "data", "vlm", "folds", "args") if (value := getattr(self, key))}
        return yaml.safe_dump({**top, "stages": stages}, sort_keys=False, width=120)


def read_pipeline(config: str) -> PipelineSpec:
    """Reads and checks a pipeline file.

    Raises:
        ValueError: If the file is missing or malformed, or names an unknown key, a missing config, or an artefact that
            no earlier stage writes. The message names file and key.
    """
    path = locate_config(config, PIPELINE_CONFIG)
    top = _mapping(read_yaml(path), f"{path}", _PIPELINE_KEYS)
    rows = top.get("stages")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: key 'stages' must be a list of stages")
    stages: list[StageSpec] = []
    for number, row in enumerate(rows, 1):
        stages.append(_read_stage(row, f"{path}: stages[{number}]", stages, top.get("strategy")))
    seed, folds = top.get("seed", 0), top.get("folds", 0)
    for key, value in (("seed", seed), ("folds", folds)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{path}: key {key!r} must be a whole number, got {value!r}")
    return PipelineSpec(
        name=str(top.get("name", path.stem)),
        description=str(top.get("description", "")),
        stages=tuple(stages),
        source=str(path),
        needs=str(top.get("needs", "")),
        data=cast("str | None", top.get("data")),
        vlm=cast("str | None", top.get("vlm")),
        seed=cast("int", seed),
        args=_settings(top.get("args"), f"{path}: key 'args'"),
        folds=cast("int", folds),
    )


def _read_stage(row: object, where: str, before: Sequence[StageSpec], strategy: object) -> StageSpec:
    stage = _mapping(row, where, _STAGE_KEYS)
    for key in ("name", "command", "config"):
        if not isinstance(stage.get(key), str):
            raise ValueError(f"{where}: key {key!r} is missing")
    name, command, config = (str(stage[key]) for key in ("name", "command", "config"))
    where = f"{where} ({name})"
    if not _NAME.fullmatch(name) or name in SECTIONS:
        raise ValueError(f"{where}: a stage's name is lower case with underscores and none of {', '.join(SECTIONS)}")
    if name in [other.name for other in before]:
        raise ValueError(f"{where}: key 'name': there is a stage {name!r} already")
    if command not in ARTEFACT_OF:
        raise ValueError(f"{where}: key 'command' must be one of {', '.join(ARTEFACT_OF)}, got {command!r}")
    policy = stage.get("on_unparsed", "stop")
    if policy not in ("stop", "skip"):
        raise ValueError(f"{where}: key 'on_unparsed' must be stop or skip, got {policy!r}")
    cross_fit = stage.get("cross_fit", True)
    if not isinstance(cross_fit, bool):
        raise ValueError(f"{where}: key 'cross_fit' must be true or false, got {cross_fit!r}")
    try:
        locate_config(config)
    except ValueError as error:
        raise ValueError(f"{where}: key 'config': {error}") from error
    when = _read_condition(stage.get("when"), f"{where}: key 'when'", before)
    inputs = {
        key: _read_references(value, f"{where}: inputs.{key}", before, when)
        for key, value in _settings(stage.get("inputs"), f"{where}: key 'inputs'").items()
    }
    args = _settings(stage.get("args"), f"{where}: key 'args'")
    strategy = stage.get("strategy", strategy)
    try:
        overlay = None if strategy is None else strategy_file(str(strategy))
    except ValueError as error:
        raise ValueError(f"{where}: key 'strategy': {error}") from error
    return StageSpec(name, cast(Command, command), config, args, inputs, policy, overlay, when, cross_fit)


def _read_condition(value: object, where: str, before: Sequence[StageSpec]) -> Condition | None:
    if value is None:
        return None
    match = _CONDITION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{where}: must read STAGE.language or not STAGE.language, got {value!r}")
    writers = [stage.name for stage in before if stage.command == "predict"]
    if match[2] not in writers:
        raise ValueError(
            f"{where}: no earlier stage {match[2]!r} that writes texts{did_you_mean(match[2], writers, '; ')}"
        )
    return Condition(match[2], match[1] is None)


def _read_references(
    value: object, where: str, before: Sequence[StageSpec], when: Condition | None
) -> tuple[Reference | None, ...]:
    match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{where}: must read "{{stage.artefact}}", got {value!r}; fixed values belong in args')
    references: list[Reference | None] = []
    stages = {stage.name: stage for stage in before}
    for text in match[1].split("|"):
        name, _, artefact = text.strip().partition(".")
        if references and (references[-1] is None or text.strip() == _NONE):
            references.append(None)
            continue
        if name not in stages:
            raise ValueError(f"{where}: no earlier stage {name!r}{did_you_mean(name, list(stages), '; ')}")
        if artefact != stages[name].artefact:
            raise ValueError(f"{where}: stage {name} ({stages[name].command}) writes {stages[name].artefact!r} only")
        references.append(Reference(name, stages[name].artefact))
    # the last alternative has to exist whatever happens
    last = references[-1]
    if last is not None and (reason := _may_lack_artefact(stages[last.stage], when)):
        raise ValueError(
            f"{where}: stage {last.stage} may end without an artefact ({reason}); name what to take instead, "
            f'"{{{last}|earlier_stage.{last.artefact}}}", or leave the setting out then, "{{{last}|{_NONE}}}"'
        )
    return tuple(references)


def _may_lack_artefact(stage: StageSpec, when: Condition | None) -> str:
    """Returns why a stage may write no artefact where another one with the condition ``when`` runs, if it may."""
    if stage.on_unparsed == "skip":
        return "on_unparsed: skip"
    return f"when: {stage.when}" if stage.when not in (None, when) else ""


def _mapping(value: object, where: str, known: Sequence[str]) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a mapping with the keys {', '.join(known)}")
    for key in value:
        if key in PIPELINE_MOVED:
            raise ValueError(explain_moved(key, PIPELINE_MOVED[key], where))
        if key not in known:
            raise ValueError(
                f"{where}: unknown key {key!r}{did_you_mean(str(key), known, '; ')}; known: {', '.join(known)}"
            )
    return {str(key): item for key, item in value.items()}


def _settings(value: object, where: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where} must map dotted settings to values (trainer.max_steps: 5), got {value!r}")
    return {str(key): item for key, item in value.items()}
