"""Computes log-probabilities of completions behind video prompts with vLLM; run by a Python that has vLLM.

It reads ``requests.pt`` in the folder that it is given, and writes ``answers.pt``. Nothing of vidreason is imported.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # compiling small functions takes longer than running these models
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def prompt_of(request: dict[str, Any]) -> dict[str, Any]:
    """Returns a prompt of vLLM: tokens with one placeholder for the video, or each image, then the completion."""
    pixels = {"video": (request["frames"].numpy(), {**request["metadata"], "do_sample_frames": False})}
    return {
        "prompt_token_ids": request["prompt"] + request["completion"],
        "multi_modal_data": request["embedded"] or pixels,
        "mm_processor_kwargs": request["options"],
    }


def main(folder: Path) -> None:
    """Answers the requests of a folder with one engine."""
    import torch
    import transformers
    import vllm
    from vllm.lora.request import LoRARequest

    job = torch.load(folder / "requests.pt")
    adapters = sorted({request["adapter"] for request in job["requests"] if request["adapter"]})
    embedded = [request["embedded"] for request in job["requests"] if request["embedded"]]
    # Options only where they are needed: not every family accepts them.
    options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": job["rank"]} if adapters else {}
    options |= {"enable_mm_embeds": True} if embedded else {}
    options |= {"mm_processor_kwargs": job["processor"]} if job.get("processor") else {}
    engine = vllm.LLM(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=2048,
        enforce_eager=True,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"video": 1, "image": max([len(data.get("image", ())) for data in embedded], default=0)},
        max_logprobs=-1,
        **options,
    )
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, detokenize=False)
    answers = []
    for request in job["requests"]:
        number = adapters.index(request["adapter"]) + 1 if request["adapter"] else 0
        adapter = LoRARequest(f"adapter{number}", number, request["adapter"]) if number else None
        (output,) = engine.generate([prompt_of(request)], sampling, lora_request=adapter, use_tqdm=False)
        rows = output.prompt_logprobs[-len(request["completion"]) :]
        table = torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows], dtype=torch.float64)
        answers.append({"ids": list(output.prompt_token_ids), "logprobs": table})
    modules = {"vLLM": vllm, "transformers": transformers, "torch": torch}
    versions = {name: str(module.__version__) for name, module in modules.items()}
    torch.save({"versions": versions, "answers": answers}, folder / "answers.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
