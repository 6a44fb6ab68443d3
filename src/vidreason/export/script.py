"""The script in a model card: the probabilities of an exported folder with transformers and PEFT alone.

It is put together from the parts that the model needs and computes what the engine computes, one text at a time: frames
as ``datamodules/clips/sampling.py`` takes them, positions of Qwen2-VL and Qwen2.5-VL as in ``vlms/rotary.py``, the
noise of ``vlms/completions.py``, and the review of ``datamodules/prompts.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import AutoConfig

from vidreason.answering.exported import ExportInfo
from vidreason.lightning_modules.vlms.base import VLM
from vidreason.lightning_modules.vlms.tiny.vlm import TinyVLM
from vidreason.rewards.completion import MARKUP

PUBLISHED_POSITIONS = ("qwen2_vl", "qwen2_5_vl")
"""Model types whose positions transformers 5.19 to 5.24 computes otherwise than their weights were trained with."""
_DTYPES = {"float32": "torch.float32", "bfloat16": "torch.bfloat16"}
_ON_THIS_MACHINE = "torch.bfloat16 if torch.cuda.is_available() else torch.float32"

_SHOW = """\
def show(asked):
    given = {"text": [asked["prompt"]], "videos": [[frames]], "video_metadata": [times]}
    return dict(processor(**given, return_tensors="pt", {options}).to(device))
"""
_SCORE = """\
def score(inputs, ids, behind=()):  # log-probability of the tokens behind a prompt
    tail, prompt = torch.tensor([[*behind, *ids]], device=device), inputs["input_ids"].shape
    more, zeros = {"input_ids": tail, "attention_mask": torch.ones_like(tail)}, torch.zeros_like(tail)
    longer = {k: torch.cat([v, more.get(k, zeros)], 1) if v.shape == prompt else v for k, v in inputs.items()}
    logits = model(**longer).logits[0, -len(ids) - 1 : -1].float()
    logits[:, asked["suppressed_tokens"]] = -torch.inf
    return logits.log_softmax(-1).gather(1, tail[:, len(behind) :].T).sum()
"""
_DIRECT = """\
given = {"text": [asked["prompt"]], "videos": [[frames]], "video_metadata": [times]}
shown = processor(**given, return_tensors="pt", {options}).to(device)
scores = []
for ids in asked["answers"].values():
    tail, prompt = torch.tensor([ids], device=device), shown["input_ids"].shape
    more, zeros = {"input_ids": tail, "attention_mask": torch.ones_like(tail)}, torch.zeros_like(tail)
    inputs = {k: torch.cat([v, more.get(k, zeros)], 1) if v.shape == prompt else v for k, v in shown.items()}
    logits = model(**inputs).logits[0, -len(ids) - 1 : -1].float()
    logits[:, asked["suppressed_tokens"]] = -torch.inf
    scores.append(logits.log_softmax(-1).gather(1, tail.T).sum())
print(json.dumps(dict(zip(asked["answers"], {scaled}.softmax(0).tolist()))))
"""
_WRITE = """\
how, asks = info["export"]["decide"], info["{asks}"]
config = GenerationConfig.from_pretrained(folder)
def draw(number):  # the same noise as in the run
    seed = hashlib.sha256(f"{{how['seed']}}/0/{{clip}}/{{number}}".encode()).digest()[:8]
    noise = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "big") >> 1)).random(config.max_new_tokens)
    def choose(ids, logits):
        likelihood = (logits.float() / how["sampling"]["temperature"]).softmax(-1)
        mass = likelihood.double().cumsum(-1)
        token = torch.searchsorted(mass, float(noise[ids.shape[1] - start]) * mass[:, -1:], right=True)
        return torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)
    return choose
def write(number):
    made = {writer}.generate(**shown, generation_config=config, do_sample=False{chosen})[0, start:].tolist()
    ends = [place for place, token in enumerate(made) if token in config.eos_token_id]
    words = processor.tokenizer.decode(made[: ends[0] if ends else None], clean_up_tokenization_spaces=False)
    return asks["reasoning_start"] + words
shown = show(asks)
start = shown["input_ids"].shape[1]
{activate}traces = [write(number) for number in range(how["samples"])]
"""
_TRUNCATED = """\
        order = likelihood.argsort(dim=-1, descending=True, stable=True)
        ranked = likelihood.gather(-1, order)
        ranked[:, {top_k}:] = 0
        share = ranked / ranked.sum(-1, keepdim=True)
        ranked[(share.cumsum(-1) - share >= {top_p}) & (share.cumsum(-1) > share)] = 0
        likelihood = torch.zeros_like(likelihood).scatter(-1, order, ranked)
"""
_REVIEW = """\
def block(text, tag):
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return found and found[1].strip()
{activate}inputs, found = show(asked), []
for trace in traces:
    account, answer = block(trace, "think"), block(trace, "answer")
    account = trace.strip() if account is None else account
    account = "none" if re.fullmatch(r"\\s*<answer>[^<>]*\\S[^<>]*</answer>\\s*", trace) else account
    words = f"\\nAccount: {account}\\nConclusion: {'none' if answer is None else answer}"
    behind = processor.tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    behind += processor.tokenizer(asked["turn_end"], add_special_tokens=False)["input_ids"]
    found.append(torch.stack([score(inputs, ids, behind) for ids in asked["answers"].values()]).softmax(0))
scores = torch.stack(found).mean(0).log() / info["temperature"]
print(json.dumps(dict(zip(asked["answers"], scores.softmax(0).tolist()))))
"""
_CONTINUE = """\
{activate}inputs, found, tags = show(asked), [], r"{tags}"
for trace in traces:
    block = re.search("<think>(.*?)</think>", trace, re.DOTALL)
    words = re.sub(tags, "", (block[1] if block else trace).split("<answer>")[0], flags=re.IGNORECASE).strip()
    begun, scores = f"{words}</think>" if asked["reasoning_start"] else f"{asked['lead']}<think>{words}</think>", []
    for name in asked["answers"]:
        told = processor.tokenizer(
            f"{begun}<answer>{name}</answer>",
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        first, ids = sum(end <= len(begun) for _, end in told["offset_mapping"]), told["input_ids"]
        scores.append(score(inputs, ids[first:] + asked["end_of_turn"], ids[:first]))
    found.append(torch.stack(scores).softmax(0))
scores = torch.stack(found).mean(0).log() / info["temperature"]
print(json.dumps(dict(zip(asked["answers"], scores.softmax(0).tolist()))))
"""
_VOTE = """\
answers = [re.search("<answer>(.*?)</answer>", trace, re.DOTALL) for trace in traces]
names = list(asked["answers"])
named = [next((name for name in names if a and a[1].strip().casefold() == name.casefold()), None) for a in answers]
counts = torch.tensor([named.count(name) + named.count(None) / len(names) + 0.01 for name in names])
print(json.dumps({"traces": traces, "probs": dict(zip(names, (counts / counts.sum()).tolist()))}))
"""


class Kinds(NamedTuple):
    """The kinds of weights in an exported folder: ``adapter`` or ``model``, and the same of its policy."""

    own: str
    policy: str | None
    """None if the base writes the traces, or none are written."""


def card_script(info: ExportInfo, kinds: Kinds, vlm: VLM, shows_video: bool) -> str | None:
    """Returns the script; None for a model that transformers has no class for.

    Args:
        info: The export.
        kinds: What lies in the folder.
        vlm: The model family, with its processor.
        shows_video: Whether the model that decides sees the video, and not a black one.
    """
    if isinstance(vlm, TinyVLM):
        return None
    decide: Any = info.decide
    reviews = decide["by"] == "review"
    writes = decide["by"] == "answer" or (reviews and decide["input"] != "video")
    parts = [_head(info, kinds, vlm, writes), _frames(info, vlm)]
    if info.vlm["model_type"] in PUBLISHED_POSITIONS:
        parts.append(_positions(vlm, kinds))
    options = _options(info, vlm)
    if not writes:
        scaled = f"(torch.stack(scores) / {decide['temperature']})" if reviews else "torch.stack(scores)"
        return "".join([*parts, _DIRECT.replace("{scaled}", scaled).replace("{options}", options)])
    parts += [_SHOW.replace("{options}", options), _writing(decide, kinds)]
    if not reviews:
        return "".join([*parts, _VOTE])
    black = "" if shows_video else "frames = 0 * frames\n"
    review = _CONTINUE.replace("{tags}", MARKUP.pattern) if decide["input"] == "video+reasoning" else _REVIEW
    return "".join([*parts, _SCORE, black, review.replace("{activate}", _activate(kinds, "own"))])


def _head(info: ExportInfo, kinds: Kinds, vlm: VLM, writes: bool) -> str:
    """Returns the imports, the processor and the models."""
    four_bit = info.vlm["quantize"] == "nf4"
    names = ["AutoModelForImageTextToText", "AutoProcessor"]
    names += ["BitsAndBytesConfig"] * four_bit + ["GenerationConfig"] * writes
    dtype = _DTYPES.get(str(info.vlm["dtype"]), _ON_THIS_MACHINE)
    options = f"dtype={dtype}" + ", quantization_config=four_bit" * four_bit
    base = "folder" if kinds.own == "model" else 'f"{folder}/policy"'
    if "model" not in kinds:
        base = repr(info.base["name"]) if info.base["path"] is None else "sys.argv[3]"
    read = 'info["inputs"]' if writes else 'json.load(open(f"{folder}/vidreason.json"))["inputs"]'
    lines = [
        "import json, sys, av, torch" + ", hashlib, re" * writes,
        "import numpy as np" if writes or info.frames["max_pixels"] is not None else "",
        "from PIL import Image" if info.frames["max_pixels"] is not None else "",
        "from peft import PeftModel" if "adapter" in kinds else "",
        f"from transformers import {', '.join(names)}",
        "from transformers.video_utils import VideoMetadata",
        'folder, clip, device = *sys.argv[1:3], "cuda" if torch.cuda.is_available() else "cpu"',
        'info = json.load(open(f"{folder}/vidreason.json"))' if writes else "",
        f"asked, processor = {read}, AutoProcessor.from_pretrained(folder)",
    ]
    if four_bit:
        skipped = list(vlm.unquantised)
        lines.append(
            'four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f"bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype={dtype}, llm_int8_skip_modules={skipped})"
        )
    load = f"AutoModelForImageTextToText.from_pretrained({base}, {options})"
    own = ', "own"' if writes else ""
    peft = f"PeftModel.from_pretrained({load}, folder{own}).to(device)"
    if info.precision.endswith("-mixed"):
        half = "torch.bfloat16" if info.precision.startswith("bf16") else "torch.float16"
        lines.append(f"torch.autocast(device, dtype={half}).__enter__()")
    lines.append("model = " + (peft if kinds.own == "adapter" else f"{load}.requires_grad_(False).to(device)"))
    if kinds.policy == "adapter":
        lines.append('model.load_adapter(f"{folder}/policy", "policy")')
    if kinds == ("model", "model"):
        lines.append(
            f'policy = AutoModelForImageTextToText.from_pretrained(f"{{folder}}/policy", {options}).to(device)'
        )
    return "\n".join(filter(None, lines)) + "\n"


def _frames(info: ExportInfo, vlm: VLM) -> str:
    """Returns the decoding of the clip, its frames and their times, and the function ``show``."""
    frames: Any = info.frames
    number, fps = int(frames["num_frames"]), frames["fps"]
    by_rate = frames["sampling"] == "fps"
    evenly = f"[(2 * i + 1) * len(images) // {2 * number} for i in range({number})]"
    lines = [
        "rate = float(av.open(clip).streams.video[0].average_rate)",
        'images = [image.to_ndarray(format="rgb24") for image in av.open(clip).decode(video=0)]',
    ]
    if by_rate:
        lines += [
            f"count = max(int(len(images) / rate * {fps} + 1e-3), 1)",
            f"taken = [min(int(i * rate / {fps} + 1e-3), len(images) - 1) for i in range(count)]",
            f"taken = taken if count <= {number} else {evenly}",
        ]
    else:
        lines.append(f"taken = {evenly}")
    if vlm.frame_count(number) != number or (by_rate and vlm.frame_count(1) != 1):
        lines.append("taken += taken[-1:] * (len(taken) % 2)")
    shown = "images[i]"
    if frames["max_pixels"] is not None:
        shown = "fit(images[i])"
        lines += [
            "def fit(image):",
            f"    (short, long), most = sorted(image.shape[:2]), {frames['max_pixels']}",
            "    scale = min((most / (short * long)) ** 0.5, 1)",
            "    small = max(int(short * scale), 1) if scale < 1 else short",
            "    large = min(max(int(long * scale), 1), most // small) if scale < 1 else long",
            "    size = (large, small) if image.shape[1] >= image.shape[0] else (small, large)",
            "    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))",
        ]
    lines += [
        f"frames = torch.stack([torch.from_numpy({shown}) for i in taken]).permute(0, 3, 1, 2)",
        "times = VideoMetadata(len(images), fps=rate, duration=len(images) / rate, frames_indices=taken)",
    ]
    return "\n".join(lines) + "\n"


def _options(info: ExportInfo, vlm: VLM) -> str:
    """Returns what the processor is told in a call; that of the folder has the other limits of the run."""
    options = "add_special_tokens=False"
    if info.frames["sampling"] == "fps" and vlm.video_options(2) != vlm.video_options(4):  # over all frames of a clip
        least, most = vlm.video_options(10**6)["size"]["shortest_edge"], int(vlm.max_pixels or 0)
        options += f', size={{"shortest_edge": min({least}, {most} * len(taken)), "longest_edge": {most} * len(taken)}}'
    return options


def _positions(vlm: VLM, kinds: Kinds) -> str:
    """Returns the rule of ``rotary.video_positions`` for one prompt, in place of that of transformers."""
    config = AutoConfig.from_pretrained(vlm.path)
    merge, rate = config.vision_config.spatial_merge_size, getattr(config.vision_config, "tokens_per_second", None)
    time = "torch.arange(t)" if rate is None else f"(torch.arange(t) * second_per_grid_ts.cpu()[0] * {rate}).long()"
    lines = [
        f"def positions(input_ids, *_, video_grid_thw{', second_per_grid_ts' if rate is not None else ''}, **__):",
        f"    first, (t, h, w) = input_ids[0].tolist().index({config.video_token_id}), "
        f"(video_grid_thw[0] // torch.tensor([1, {merge}, {merge}])).tolist()",
        f"    video = torch.cartesian_prod({time}, torch.arange(h), torch.arange(w)).T + first",
        "    rest = torch.arange(input_ids.shape[1] - first - t * h * w) + video.max() + 1  # behind all of the video",
        "    found = torch.cat([torch.arange(first).expand(3, -1), video, rest.expand(3, -1)], 1)[:, None]",
        "    return found.to(device), (found.max() + 1 - input_ids.shape[1]).view(1, 1).to(device)",
    ]
    models = ["model.get_base_model()" if "adapter" in kinds else "model", *["policy"] * (kinds == ("model", "model"))]
    return "\n".join([*lines, *(f"{model}.model.get_rope_index = positions" for model in models)]) + "\n"


def _writing(decide: Any, kinds: Kinds) -> str:
    """Returns the part that samples traces or answers."""
    sampling = decide["sampling"]
    text = _WRITE
    if sampling["top_p"] < 1 or sampling["top_k"] > 0:
        place = "        mass = likelihood.double().cumsum(-1)\n"
        cut = _TRUNCATED.format(top_k=sampling["top_k"] or 10**9, top_p=sampling["top_p"])
        text = text.replace(place, cut.replace("{", "{{").replace("}", "}}") + place)
    chosen = ", logits_processor=[draw(number)]"
    if sampling["temperature"] == 0:
        first, last = text.index("def draw"), text.index("def write")
        text = text[:first] + text[last:]
        chosen = ""
    two_models = kinds == ("model", "model")
    return text.format(
        asks="policy_inputs" if decide["by"] == "review" else "inputs",
        writer="policy" if two_models else "model",
        chosen=chosen,
        activate=_activate(kinds, "policy") if decide["by"] == "review" else "",
    )


def _activate(kinds: Kinds, which: str) -> str:
    """Returns the line that activates the weights of the policy, or those that review its traces."""
    if kinds.own != "adapter":
        return ""
    if kinds.policy == "adapter":
        return f'model.set_adapter("{"own" if which == "own" else "policy"}")\n'
    return (
        "model.base_model.disable_adapter_layers()\n"
        if which == "policy"
        else "model.base_model.enable_adapter_layers()\n"
    )
