"""Keys of stage and pipeline files that have moved; the error for an old key names its new place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

MODEL = "model.init_args."
"""Prefix of the keys of ``MOVED``."""

MOVED: Mapping[str, str] = {
    **{key: f"optim.{key}" for key in ("optimizer", "schedule", "warmup")},
    "decide": "decide.by",
    "samples": "decide.samples",
    "sampling": "decide.sampling",
    "predict": "traces.kind",
    "traces_sampled": "traces",
    "traces": "traces_file",
    "target": "targets.kind",
    "min_steps": "trainer.max_steps",
    **{key: f"targets.{key}" for key in ("compose", "caption_field", "answer_weight")},
    "group_size": "rollouts.group_size",
    "train_sampling": "rollouts.sampling",
    "resample": "rollouts.resample",
    "balance_classes": "rollouts.balance_classes",
    "cold_steps": "rollouts.max_unparsed_steps",
    "loss": "objective",
    "loss_type": "loss.type",
    **{
        key: f"loss.{key}"
        for key in (
            "ratio_level",
            "clip_eps_low",
            "clip_eps_high",
            "cispo_clip_max",
            "dual_clip",
            "importance_cap",
            "kl_coef",
            "kl_bias_correction",
            "entropy_coef",
            "advantage_scale",
            "mask_truncated",
        )
    },
    "prompts_per_forward": "updates.clips_per_forward",
    **{key: f"updates.{key}" for key in ("max_grad_norm", "inner_epochs", "minibatches")},
}
"""Old to new name of stage arguments."""

PIPELINE_MOVED: Mapping[str, str] = {"on_cold_policy": "on_unparsed"}
"""Old to new key of the stages of a pipeline file."""

GROUPS = ("decide", "traces", "loss")
"""Old names that are groups of settings now; a value that is not a mapping means the old key."""


def new_place(key: str, value: object = None) -> str | None:
    """Returns the new key of a setting of a stage; None if it has not moved.

    Args:
        key: Dotted key from ``model`` on.
        value: The value of the setting.

    >>> new_place("model.init_args.kl_coef", 0.1)
    'model.init_args.loss.kl_coef'
    >>> new_place("model.init_args.traces_sampled.sampling.temperature", 1.0)
    'model.init_args.traces.sampling.temperature'
    >>> new_place("model.init_args.loss", "tokens"), new_place("model.init_args.loss", {"type": "grpo"})
    ('model.init_args.objective', None)
    """
    if not key.startswith(MODEL):
        return None
    head, dot, rest = key.removeprefix(MODEL).partition(".")
    if head not in MOVED or (head in GROUPS and (dot or isinstance(value, Mapping))):
        return None
    place = MOVED[head] + dot + rest
    return place if place.startswith("trainer.") else MODEL + place


def moved_settings(content: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields (old key, new key) of every moved setting of a stage file, or of a section of one.

    Args:
        content: The parsed YAML.
        key: Dotted key of ``content``; empty for a whole file.
    """
    if not isinstance(content, Mapping):
        return
    for name, value in content.items():
        dotted = f"{key}.{name}" if key else str(name)
        place = new_place(dotted, value)
        if place is not None:
            yield dotted, place
        else:
            yield from moved_settings(value, dotted)


def explain_moved(old: str, new: str, place: str = "") -> str:
    """Returns the message about a moved key.

    >>> explain_moved("on_cold_policy", "on_unparsed", "my.yaml")
    'on_cold_policy has moved to on_unparsed (in my.yaml)'
    """
    return f"{old} has moved to {new}" + (f" (in {place})" if place else "")
