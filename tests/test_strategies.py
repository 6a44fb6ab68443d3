"""Every stage trains under every strategy overlay, in one process on a CPU; overlays and ``debug.yaml`` combine."""

import re
from itertools import product
from pathlib import Path

import pytest
import rank_processes as processes
import stage_world as world
import torch
import yaml
from covering import covering, sample

from vidreason.config.trainer_cli import build
from vidreason.lightning_modules.decisions.deciders import DecideOptions
from vidreason.lightning_modules.fit.fsdp import FSDP2
from vidreason.lightning_modules.rl.sampler import RolloutOptions
from vidreason.lightning_modules.traces.generation import TraceOptions
from vidreason.lightning_modules.traces.rationale_filter import RationaleFilter
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.loading.adapters import LoRAOptions
from vidreason.lightning_modules.vlms.loading.sharding import is_unsharded, shard, unsharded
from vidreason.lightning_modules.vlms.prefix.layout import is_sharded
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM

small_base, clip_folder, make_vlm, make_data = world.small_base, world.clip_folder, world.make_vlm, world.make_data
gathered, without_ranks = processes.gathered, processes.without_ranks
pytestmark = pytest.mark.usefixtures("without_ranks")

CONFIGS = Path(__file__).parent.parent / "configs"
STAGES = ("sft_label.yaml", "sft_cold_start.yaml", "grpo.yaml", "calibration.yaml")
OVERLAYS = sorted(p.stem for p in (CONFIGS / "strategy").glob("*.yaml"))
ONE_MACHINE = [name for name in OVERLAYS if name != "multi_node"]
SHORT = Sampling(max_new_tokens=6)


def overlay(name):
    return ["--config", str(CONFIGS / "strategy" / f"{name}.yaml")]


def made(stage, *arguments):
    on_cpu = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    return build("fit", ["--config", str(CONFIGS / stage), *arguments, *on_cpu, "--run_dir", "run"])


@pytest.fixture
def small(small_base, make_data):
    """``small(cli)``: the run on the small base, in two steps."""

    def make(cli):
        module = cli.model
        module.vlm.path = str(small_base)
        module.batch_size = 3
        module.decide = DecideOptions(module.decide.by, sampling=SHORT)
        module.traces = TraceOptions(
            module.traces.kind, samples=1, sampling=SHORT, filter=RationaleFilter(complete=False)
        )
        module.rollouts = RolloutOptions(group_size=2, sampling=SHORT, max_unparsed_steps=99)
        return module, make_data(module.vlm)

    return make


@pytest.mark.parametrize(("stage", "name"), covering(STAGES, ONE_MACHINE))
def test_every_stage_trains_under_every_strategy(stage, name, small):
    settings = yaml.safe_load((CONFIGS / "strategy" / f"{name}.yaml").read_text())
    short = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.check_val_every_n_epoch=null"]
    cli = made(stage, *overlay(name), *short)
    module, data = small(cli)
    before = {}

    def remember():
        with torch.no_grad():
            before.update(world.parameters(module))

    module.on_fit_start = remember
    cli.trainer.fit(module, data)
    assert cli.trainer.global_step == 2
    assert is_sharded(module.policy) == name.startswith("fsdp") == isinstance(cli.trainer.strategy, FSDP2)
    after = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert after.keys() == before.keys()
    if stage != "grpo.yaml":  # two random completions are worth nothing as a rule, so that nothing moves
        assert any(not torch.equal(gathered(after[n]), gathered(before[n])) for n in after)
    asked = settings.get("vlm", {}).get("init_args", {})
    quantised = [p for p in module.parameters() if type(p).__name__ == "Params4bit" or p.dtype == torch.uint8]
    assert bool(quantised) == (asked.get("quantize") == "nf4")
    adapter = asked.get("lora") is not None or stage == "calibration.yaml"
    assert all(("lora_" in n) == adapter for n in after)
    assert (Path("run") / ("adapter" if adapter else "weights") / "vidreason.json").is_file()


@pytest.mark.parametrize(("stage", "name"), sample(list(product(STAGES, OVERLAYS)), ("grpo.yaml", "fsdp_qlora")))
def test_debug_and_a_strategy_combine_in_either_order(stage, name):
    debug = ["--config", str(CONFIGS / "debug.yaml")]
    found = []
    for order in ([*overlay(name), *debug], [*debug, *overlay(name)]):
        cli = made(stage, *order)
        vlm = cli.model.vlm
        found.append((vlm.lora, vlm.quantize, vlm.dtype, type(cli.trainer.strategy), cli.trainer.num_nodes))
        assert cli.trainer.max_steps == 2
    assert found[0] == found[1]


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_overlay_sets_what_grpo_owns(name):
    trainer = yaml.safe_load((CONFIGS / "strategy" / f"{name}.yaml").read_text()).get("trainer", {})
    assert not {"gradient_clip_val", "accumulate_grad_batches", "accelerator", "precision"} & set(trainer)


PAGED = ["--model.init_args.optim.optimizer=bitsandbytes.optim.PagedAdamW8bit"]


def test_paged_8_bit_adamw_is_an_option(small):
    cli = made("sft_label.yaml", *overlay("qlora"), *PAGED, "--trainer.max_steps", "2", "--trainer.limit_val_batches=0")
    module, data = small(cli)
    cli.trainer.fit(module, data)
    assert type(cli.trainer.optimizers[0]).__name__ == "PagedAdamW8bit"
    moved = [p for n, p in module.named_parameters() if "lora_B" in n]
    assert any(bool(p.any()) for p in moved), "B starts at 0"


def test_paged_8_bit_adamw_is_refused_where_weights_are_sharded(small):
    cli = made("sft_label.yaml", *overlay("fsdp"), *PAGED, "--trainer.max_steps", "2", "--trainer.limit_val_batches=0")
    module, data = small(cli)
    with pytest.raises(ValueError, match=r"PagedAdamW8bit.*torch\.optim\.AdamW"):
        cli.trainer.fit(module, data)


def test_unsharded_gathers_once_and_shards_again(small):
    cli = made("sft_label.yaml", *overlay("fsdp"), "--trainer.max_steps", "1", "--trainer.limit_val_batches=0")
    module, data = small(cli)
    cli.trainer.fit(module, data)
    assert not is_unsharded(module.policy)
    with unsharded(module.policy):
        assert is_unsharded(module.policy)
        with unsharded(module.policy):
            assert is_unsharded(module.policy)
        assert is_unsharded(module.policy), "the inner one leaves it as it was"
    assert not is_unsharded(module.policy)


def test_fsdp_names_the_parameters_of_another_dtype(small_base):
    model = TinyVLM(path=str(small_base), lora=LoRAOptions(r=4, alpha=8)).build()
    odd = [name for name, p in model.named_parameters() if p.requires_grad and "layers.0.self_attn.q_proj" in name]
    for name, parameter in model.named_parameters():
        if name in odd:
            parameter.data = parameter.data.bfloat16()
    assert len(odd) == 2
    with pytest.raises(ValueError, match=rf"most are torch\.float32, but 2 are not.*{re.escape(', '.join(odd))}"):
        shard(model, mesh=None)


@pytest.mark.slow
def test_4_bits_in_bfloat16_are_sharded_with_their_adapter(small):
    """The storage is bfloat16 then, as it is on GPUs, and the adapter float32."""
    short = ["--vlm.init_args.dtype", "bfloat16", "--trainer.max_steps", "2", "--trainer.limit_val_batches=0"]
    cli = made("sft_label.yaml", *overlay("fsdp_qlora"), *short)
    module, data = small(cli)
    cli.trainer.fit(module, data)
    assert any(type(p).__name__ == "DTensor" and p.dtype == torch.bfloat16 for p in module.parameters())
    assert any(bool(gathered(p).any()) for n, p in module.named_parameters() if "lora_B" in n), "B starts at 0"
