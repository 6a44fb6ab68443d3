"""The losses of 20 optimizer steps, pinned: whatever changes what a stage learns shows here.

The numbers are what ``trace_of`` returned when they were pinned. ``python -m pytest tests/test_loss_traces.py -s``
prints those of today in the same form; a change that is meant is copied from there. The base's weights are drawn with
NumPy by parameter name, so that no library's initialisation is pinned along with the losses.
"""

import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vidreason.datamodules.prompts import DescribeView, ReasonView
from vidreason.datamodules.traces import TraceHeader, TraceRecord, TraceStore
from vidreason.lightning_modules.calibration import CalibrationModule
from vidreason.lightning_modules.grpo import REFERENCE, GRPOModule
from vidreason.lightning_modules.grpo_parts import Part
from vidreason.lightning_modules.own_traces import TraceOptions
from vidreason.lightning_modules.rollout import CompletionBatch
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.vlms.tiny.modeling import TinyVLMForConditionalGeneration
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM
from vidreason.rewards.completion import parse_completion, render_completion

_spec = importlib.util.spec_from_file_location("stage_world", Path(__file__).with_name("stage_world.py"))
assert _spec is not None
assert _spec.loader is not None
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)
small_base, clip_folder, make_data = world.small_base, world.clip_folder, world.make_data
make_trainer = world.make_trainer

STEPS = 20
REASONINGS = ("A person comes in and goes down.", "The lamp is off.")

PINNED = {
    "label": [
        6.42725,
        6.03718,
        6.55523,
        5.76628,
        5.34662,
        5.31711,
        4.95549,
        5.07916,
        4.92623,
        4.44839,
        4.39280,
        4.34942,
        4.12366,
        3.87074,
        3.39441,
        3.26406,
        3.02030,
        3.03122,
        2.70800,
        2.61836,
    ],
    "trace": [
        13.31175,
        12.99317,
        12.54756,
        12.05179,
        11.77382,
        11.21837,
        10.88777,
        10.68367,
        10.31935,
        9.69280,
        9.45832,
        8.94334,
        8.46550,
        7.97611,
        7.41198,
        7.01911,
        6.62843,
        6.34050,
        5.84804,
        5.60856,
    ],
    "calibration_tokens": [
        6.52907,
        6.13055,
        6.60710,
        6.19265,
        5.77132,
        5.85767,
        5.39451,
        5.63845,
        5.54884,
        5.30525,
        5.21511,
        5.31592,
        5.24601,
        5.17272,
        4.82313,
        4.96484,
        4.79277,
        4.91572,
        4.76738,
        4.79312,
    ],
    "grpo": [
        -0.04710,
        -0.09158,
        -0.12744,
        -0.12221,
        -0.12918,
        -0.13336,
        -0.13016,
        -0.13975,
        -0.14111,
        -0.14349,
        -0.13653,
        -0.14599,
        -0.14258,
        -0.14837,
        -0.14518,
        -0.14772,
        -0.14640,
        -0.14705,
        -0.15424,
        -0.14581,
    ],
}


def draw_weights(named):
    """Fills matrices and kernels with numbers that depend on nothing but their name and shape."""
    with torch.no_grad():
        for name, parameter in named:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
            drawn = np.random.Generator(np.random.PCG64(seed)).random(tuple(parameter.shape)) * 2 - 1
            parameter.copy_(torch.from_numpy(drawn / parameter[0].numel() ** 0.5))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pinned_vlm(small_base, tmp_path_factory):
    """The small base with weights that depend on nothing but their names and shapes."""
    folder = tmp_path_factory.mktemp("pinned")
    model = TinyVLMForConditionalGeneration.from_pretrained(small_base)
    draw_weights((name, p) for name, p in model.named_parameters() if p.ndim > 1)  # gains stay 1, offsets 0
    model.save_pretrained(folder)
    TinyVLM(path=str(small_base)).processor.save_pretrained(folder)
    return TinyVLM(path=str(folder))


@pytest.fixture
def trace_of(make_data, make_trainer):
    """``trace_of(module)``: the training loss of each of 20 steps of 2 clips."""

    def run(module):
        losses = []
        module.on_train_batch_end = lambda *_: losses.append(float(module.trainer.callback_metrics["train/loss"]))
        trainer = make_trainer(max_steps=STEPS, max_epochs=-1, limit_val_batches=0)
        trainer.fit(module, make_data(module.vlm, batch_size=2))
        assert trainer.global_step == len(losses) == STEPS
        return losses

    return run


def sgd(parameters):
    """Not Adam: its first steps divide noise by noise where a gradient is almost zero."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def fast_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def compare(name, losses):
    print(f'\n    "{name}": [{", ".join(f"{loss:.5f}" for loss in losses)}],')
    assert losses == pytest.approx(PINNED.get(name, []), rel=1e-3, abs=1e-5)


def write_traces(path, vlm, view, splits, data, render):
    """A file of traces as the base would have written it, two about every clip."""
    store = TraceStore.create(path, TraceHeader(False, vlm.base_sha(), "", view.sha(), data.task.sha()))
    records = []
    for clip in (clip for split in splits for clip in data.samples(split)):
        for k, reasoning in enumerate(REASONINGS):
            text = render(reasoning, world.LABELS[k])
            parsed = parse_completion(text)
            records.append(TraceRecord(clip.video_id, k, text, parsed.reasoning, parsed.answer, "stop", -1.0, 3))
    store.append(records)
    return str(path)


def test_label_sft(pinned_vlm, trace_of):
    compare("label", trace_of(RationaleSFTModule(pinned_vlm, target="label", optimizer=sgd)))


def test_cold_start(pinned_vlm, trace_of, make_data, tmp_path):
    data = make_data(pinned_vlm)
    path = tmp_path / "descriptions.jsonl"
    traces = write_traces(path, pinned_vlm, DescribeView(data.task), ["train"], data, lambda reasoning, _: reasoning)
    compare("trace", trace_of(RationaleSFTModule(pinned_vlm, target="trace", traces=traces, optimizer=sgd)))


def test_calibration(pinned_vlm, trace_of, make_data, tmp_path):
    data = make_data(pinned_vlm)
    view = ReasonView(data.task)
    traces = write_traces(tmp_path / "t.jsonl", pinned_vlm, view, ["train", "val", "cal"], data, render_completion)
    two = TraceOptions(samples=2)
    compare("calibration_tokens", trace_of(FixedLoRA(pinned_vlm, traces=traces, traces_sampled=two, optimizer=sgd)))


class FixedLoRA(CalibrationModule):
    """The calibrator's adapter starts from fixed numbers, too."""

    def build_model(self):
        model = super().build_model()
        draw_weights((name, p) for name, p in model.named_parameters() if "lora_A" in name)
        return model


class FixedCompletions(GRPOModule):
    """Updates on the same completions again and again: ratios leave 1, clipping and both penalties come into play."""

    parts = None

    def training_step(self, batch, batch_idx):
        self.parts = self.parts or [self.fixed_part()]
        self.update(self.parts)

    def fixed_part(self):
        """Two completions for each of six clips; the sampler saw log-probs a little apart from the trainer's."""
        texts = [render_completion(reasoning, world.LABELS[k]) for k, reasoning in enumerate(REASONINGS)]
        view = ReasonView(self.task, {clip.video_id: tuple(texts) for clip in self.data.clips("train")})
        batch = next(iter(self.data.loader("train", view, batch_size=6)))
        assert len(batch.texts) == 12
        advantages = torch.tensor([1.0, -0.5, 0.25, -1.0, 0.7, -0.7] * 2)
        fixed = CompletionBatch(batch.clips, batch.prompts, batch.texts, torch.zeros(batch.texts.ids.shape), ())
        part = Part(fixed, (), advantages)
        old, ref = self.frozen_logprobs(part, None), self.frozen_logprobs(part, REFERENCE)
        shift = torch.linspace(-0.2, 0.2, old.shape[1]) * batch.texts.mask
        return replace(part, batch=replace(fixed, logprobs=old + shift), old_logprobs=old, ref_logprobs=ref)


def test_grpo_on_fixed_completions(pinned_vlm, trace_of):
    module = FixedCompletions(pinned_vlm, kl_coef=0.1, entropy_coef=0.01, warmup=0, optimizer=fast_sgd)
    losses = trace_of(module)
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "kl"):
        assert float(module.trainer.callback_metrics[f"train/{name}"]) > 0, f"{name} is not tested"
    compare("grpo", losses)
