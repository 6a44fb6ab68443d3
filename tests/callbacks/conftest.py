"""Takes the fixtures of ``tests/support/stage_world.py``."""

from stage_world import clip_folder, make_data, make_trainer, make_vlm, ready, small_base  # noqa: F401
