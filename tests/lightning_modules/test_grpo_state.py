"""What GRPO's checkpoints hold of rollouts."""

from dataclasses import fields

from vidreason.lightning_modules.grpo_parts import Part
from vidreason.lightning_modules.grpo_state import _OPTIONAL


def test_every_tensor_that_a_part_may_have_is_packed() -> None:
    """A new one that is forgotten would come back as None, which means something else."""
    assert {field.name for field in fields(Part) if field.default is None} == set(_OPTIONAL)
