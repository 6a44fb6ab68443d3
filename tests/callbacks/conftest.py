"""Takes the fixtures of ``tests/stage_world.py``."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("stage_world", Path(__file__).parents[1] / "stage_world.py")
assert _spec is not None
assert _spec.loader is not None
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)

small_base, clip_folder, make_vlm, make_data = world.small_base, world.clip_folder, world.make_vlm, world.make_data
make_trainer, ready = world.make_trainer, world.ready
