"""Adds the stages of cross-fitting to a pipeline: traces of train by policies that have not trained on their clips.

A policy knows the clips that it was trained on, so that its traces about them are right more often than those about the
clips of a test, and a calibrator that learns from them trusts traces too much. With ``folds: K``, every stage that the
policy comes from is run K times more, each time without one fold of train, and the policy without a fold writes the
traces of this fold. The policy of the pipeline itself, trained on all of train, is tested, and writes the traces of the
other splits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vidreason.pipelines.spec import PipelineSpec
from vidreason.pipelines.stage import Condition, Reference, StageSpec

_TRACES = "model.init_args.traces_file"
_FOLD_TRACES = "model.init_args.fold_traces"
_SPLITS = "data.init_args.predict_splits"
_FOLD = "data.init_args.fold"
_TRAIN = "train"


def cross_fitted(spec: PipelineSpec) -> PipelineSpec:
    """Returns a pipeline with the stages that its ``folds`` add, before the first stage that gets their traces.

    A stage gets them if it trains on traces (``traces_file``) of weights that an earlier stage has trained, and does
    not say ``cross_fit: false``. The policy's own traces of train are left out if no stage needs them any more.

    Raises:
        ValueError: If no stage gets them, or the pipeline has a stage with the name of one to add.
    """
    if not spec.folds:
        return spec
    trained = _trained(spec.stages)
    readers = {stage.name: writer for stage in spec.stages if (writer := _writer(stage, trained)) is not None}
    if not readers:
        raise ValueError(
            f"{spec.source}: folds: no stage trains on traces ({_TRACES}) of weights that an earlier stage has "
            "trained, so that there is nothing to cross-fit"
        )
    stages: list[StageSpec] = []
    added: set[str] = set()
    for stage in spec.stages:
        if (writer := readers.get(stage.name)) is not None:
            if writer not in added:
                stages += [copy for fold in range(1, spec.folds + 1) for copy in _copies(spec, writer, trained, fold)]
                added.add(writer)
            traces = tuple(Reference(_name(writer, fold), "traces") for fold in range(1, spec.folds + 1))
            stages.append(replace(stage, lists={**stage.lists, _FOLD_TRACES: traces}))
        else:
            stages.append(stage)
    users = {writer: [s.name for s in spec.stages if writer in _sources(s)] for writer in added}
    unread = {writer for writer, names in users.items() if all(name in readers for name in names)}
    names = [stage.name for stage in stages]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{spec.source}: folds: adds a stage {twice[0]!r}, which there is already; rename that")
    whole = tuple(_without_train(stage) if stage.name in unread else stage for stage in stages)
    return replace(spec, stages=whole, as_written=spec)


def _sources(stage: StageSpec) -> list[str]:
    """Returns the names of the stages whose artefacts a stage gets."""
    return [
        reference.stage for references in stage.inputs.values() for reference in references if reference is not None
    ]


def _trained(stages: Sequence[StageSpec]) -> dict[str, StageSpec]:
    """Returns the stages that train, or run weights or read texts of one that has trained, in order."""
    found: dict[str, StageSpec] = {}
    for stage in stages:
        if stage.command == "fit" or any(name in found for name in _sources(stage)):
            found[stage.name] = stage
    return found


def _writer(stage: StageSpec, trained: Mapping[str, StageSpec]) -> str | None:
    """Returns the stage whose traces a stage trains on, if trained weights wrote them and it is to be cross-fitted."""
    names = [reference.stage for reference in stage.inputs.get(_TRACES, ()) if reference is not None]
    known = [name for name in names if name in trained]
    return known[0] if known and stage.command == "fit" and stage.cross_fit else None


def _copies(spec: PipelineSpec, writer: str, trained: Mapping[str, StageSpec], fold: int) -> list[StageSpec]:
    """Returns copies of the stages that the traces of a writer come from, without a fold, and of the writer for it."""
    needed = {writer}
    for name in reversed(list(trained)):
        if name in needed:
            needed |= {source for source in _sources(trained[name]) if source in trained}
    copies = []
    for name in (name for name in trained if name in needed):
        stage = trained[name]
        part = {f"{_FOLD}.of": spec.folds, f"{_FOLD}.{'only' if name == writer else 'leave_out'}": fold}
        splits = {_SPLITS: [_TRAIN]} if name == writer else {}
        inputs = {
            key: tuple(
                replace(ref, stage=_name(ref.stage, fold)) if ref is not None and ref.stage in needed else ref
                for ref in references
            )
            for key, references in stage.inputs.items()
        }
        when = stage.when
        if when is not None and when.stage in needed:
            when = Condition(_name(when.stage, fold), when.language)
        args = {**stage.args, **splits, **part}
        copies.append(replace(stage, name=_name(name, fold), args=args, inputs=inputs, when=when))
    return copies


def _name(stage: str, fold: int) -> str:
    return f"{stage}_fold{fold}"


def _without_train(stage: StageSpec) -> StageSpec:
    """Returns a writer of traces without split train, unless it would have no split left."""
    splits = stage.args.get(_SPLITS)
    left = [split for split in splits if split != _TRAIN] if isinstance(splits, list) else []
    return replace(stage, args={**stage.args, _SPLITS: left}) if left else stage
