"""The losses of 20 optimizer steps, pinned: whatever changes what a stage learns shows here.

The numbers are what ``trace_of`` returned when they were pinned. ``python -m pytest tests/test_loss_traces.py -s``
prints those of today in the same form; a change that is meant is copied from there. The base's weights are drawn with
NumPy by parameter name, so that no library's initialisation is pinned along with the losses.
"""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import stage_world as world
import torch

from vidreason.datamodules.prompts import DescribeView, ReasonView
from vidreason.datamodules.traces import TraceHeader, TraceRecord, TraceStore
from vidreason.lightning_modules.calibration import CalibrationModule
from vidreason.lightning_modules.fit.optimizer_step import UpdateOptions
from vidreason.lightning_modules.fit.schedule import OptimOptions
from vidreason.lightning_modules.grpo import GRPOModule
from vidreason.lightning_modules.rl.microbatch import MicroBatch
from vidreason.lightning_modules.rl.objective import PolicyLoss
from vidreason.lightning_modules.rl.reference import policy_logprobs, reference_logprobs
from vidreason.lightning_modules.rl.sampler import RolloutOptions
from vidreason.lightning_modules.sft import RationaleSFTModule
from vidreason.lightning_modules.traces.generation import TraceOptions
from vidreason.lightning_modules.traces.targets import TargetOptions
from vidreason.lightning_modules.vlms.completions import CompletionBatch
from vidreason.lightning_modules.vlms.generation import Sampling
from vidreason.lightning_modules.vlms.tiny.modeling import TinyVLMForConditionalGeneration
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM
from vidreason.rewards.completion import parse_completion, render_completion

small_base, clip_folder, make_data = world.small_base, world.clip_folder, world.make_data
make_trainer = world.make_trainer

STEPS = 20
REASONINGS = ("A person comes in and goes down.", "The lamp is off.")

PINNED = {
    "label": [
        6.41669,
        6.14301,
        7.03021,
        6.04083,
        5.44285,
        5.56081,
        5.12935,
        5.17142,
        4.98398,
        4.69061,
        4.36379,
        4.35674,
        4.11731,
        3.85187,
        3.53017,
        3.22453,
        3.16966,
        2.95235,
        2.56114,
        2.50382,
    ],
    "trace": [
        13.39236,
        12.88712,
        12.54293,
        11.97980,
        11.67512,
        11.27508,
        10.93486,
        10.54403,
        10.22088,
        9.82825,
        9.50793,
        9.08365,
        8.66586,
        8.22713,
        7.93906,
        7.45775,
        7.17324,
        6.78454,
        6.43057,
        6.08919,
    ],
    "calibration_tokens": [
        6.39765,
        6.34634,
        6.88362,
        6.24588,
        5.77417,
        6.17341,
        5.71891,
        5.71783,
        5.63428,
        5.66255,
        5.32356,
        5.37933,
        5.28865,
        5.18863,
        5.30272,
        5.06940,
        5.09396,
        4.88149,
        4.87873,
        4.75544,
    ],
    "grpo": [
        -0.04692,
        -0.10990,
        -0.12848,
        -0.12948,
        -0.13258,
        -0.12957,
        -0.12889,
        -0.13521,
        -0.13118,
        -0.13705,
        -0.13164,
        -0.13833,
        -0.14176,
        -0.14127,
        -0.14325,
        -0.14106,
        -0.14548,
        -0.14490,
        -0.14446,
        -0.14824,
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


UNCLIPPED = {"optim": OptimOptions(optimizer=sgd), "updates": UpdateOptions(max_grad_norm=0)}


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
    compare("label", trace_of(RationaleSFTModule(pinned_vlm, **UNCLIPPED)))


def test_cold_start(pinned_vlm, trace_of, make_data, tmp_path):
    data = make_data(pinned_vlm)
    path = tmp_path / "descriptions.jsonl"
    traces = write_traces(path, pinned_vlm, DescribeView(data.task), ["train"], data, lambda reasoning, _: reasoning)
    targets = TargetOptions(kind="trace")
    compare("trace", trace_of(RationaleSFTModule(pinned_vlm, targets=targets, traces_file=traces, **UNCLIPPED)))


def test_calibration(pinned_vlm, trace_of, make_data, tmp_path):
    data = make_data(pinned_vlm)
    view = ReasonView(data.task)
    traces = write_traces(tmp_path / "t.jsonl", pinned_vlm, view, ["train", "val", "cal"], data, render_completion)
    two = TraceOptions(kind="reason", samples=2)
    compare("calibration_tokens", trace_of(FixedLoRA(pinned_vlm, traces_file=traces, traces=two, **UNCLIPPED)))


class FixedLoRA(CalibrationModule):
    """The calibrator's adapter starts from fixed numbers, too."""

    def build_model(self):
        model = super().build_model()
        draw_weights((name, p) for name, p in model.named_parameters() if "lora_A" in name)
        return model


class FixedCompletions(GRPOModule):
    """Updates on the same completions again and again: ratios leave 1, clipping and both penalties come into play."""

    micro_batches = None

    def training_step(self, batch, batch_idx):
        self.micro_batches = self.micro_batches or [self.fixed_micro_batch()]
        self.update(self.micro_batches)

    def fixed_micro_batch(self):
        """Two completions for each of six clips; the sampler saw log-probs a little apart from the trainer's."""
        texts = [render_completion(reasoning, world.LABELS[k]) for k, reasoning in enumerate(REASONINGS)]
        view = ReasonView(self.data.task, {clip.video_id: tuple(texts) for clip in self.data.clips("train")})
        batch = next(iter(self.data.loader("train", view, batch_size=6)))
        assert len(batch.texts) == 12
        advantages = torch.tensor([1.0, -0.5, 0.25, -1.0, 0.7, -0.7] * 2)
        fixed = CompletionBatch(batch.clips, batch.prompts, batch.texts, torch.zeros(batch.texts.ids.shape), ())
        micro_batch = MicroBatch(fixed, advantages, batch.texts.loss_mask, torch.ones(12, dtype=torch.bool))
        old = policy_logprobs(self.vlm, self.policy, micro_batch, temperature=1.0)
        ref = reference_logprobs(self.vlm, self.policy, self.reference, micro_batch, temperature=1.0)
        shift = torch.linspace(-0.2, 0.2, old.shape[1]) * batch.texts.mask
        sampled = replace(fixed, logprobs=old + shift)
        return replace(micro_batch, batch=sampled, old_logprobs=old, ref_logprobs=ref)


def test_grpo_on_fixed_completions(pinned_vlm, trace_of):
    loss = PolicyLoss(kl_coef=0.1, entropy_coef=0.01)
    room = RolloutOptions(sampling=Sampling(max_new_tokens=64))  # The default does not fit this model's context.
    module = FixedCompletions(pinned_vlm, loss=loss, rollouts=room, optim=OptimOptions(optimizer=fast_sgd))
    losses = trace_of(module)
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "kl"):
        assert float(module.trainer.callback_metrics[f"train/{name}"]) > 0, f"{name} is not tested"
    compare("grpo", losses)
