"""An address space in which a whole batch at once does not fit, and one clip at a time does."""

import subprocess
import sys
from pathlib import Path

import pytest
import vlm_builders as builders

pytestmark = pytest.mark.slow

CHILD = """
import resource, sys
from vidreason.cli.main import main
from vidreason.config import trainer_cli  # what every run imports is there before the limit
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""
ROOM = 4_000_000_000
OLD = ["--model.init_args.updates.clips_per_forward", "16", "--vlm.init_args.gradient_checkpointing", "false"]


@pytest.mark.usefixtures("here")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS and /proc")
def test_the_profile_lives_where_a_whole_batch_dies(tmp_path, write_clip):
    """Twelve layers of width 256 keep about 27 kB a token and layer: 3 GB of twelve clips, 0.3 GB of one."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
    base = builders.write_qwen(tmp_path / "base", **sizes, **heads)
    rows = Path("t.csv").read_text().splitlines()
    for i in range(12):
        write_clip(Path("clips", "ab"[i % 2], f"more{i}.mp4"), 16, size=(112, 112))
        rows.append(f"clips/{'ab'[i % 2]}/more{i}.mp4,{'ab'[i % 2]},train")
    Path("t.csv").write_text("\n".join(rows) + "\n")
    common = ["fit", "--config", "configs/sft_label.yaml", "--config", "small.yaml", "--data", "data.yaml"]
    common += ["--vlm", str(base), "--data.init_args.frames.num_frames", "16", "--trainer.limit_val_batches", "0"]
    results = {}
    for name, options in {"old": OLD, "profile": []}.items():
        argv = [sys.executable, "-c", CHILD, str(ROOM), *common, *options, "--run_dir", name]
        results[name] = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert results["profile"].returncode == 0, results["profile"].stderr
    assert results["old"].returncode == 1, results["old"].stderr
    last = results["old"].stderr.splitlines()[-1]
    assert "updates.clips_per_forward is 16" in last
    assert "vidreason plan" in last
