"""Memory of long completions on a CPU: naive one at a time, the shared prefix at once and in chunks.

    python benchmarks/long_completions.py [--json FILE] [--group_size 8] [--text_tokens 2048]

Forward and backward in fp32 with the vision tower frozen, on the reference model. Naive runs the completions one
by one, with a backward after each, which needs the least memory of all naive variants. The vision cache is off. The
script takes about twelve minutes.
"""

from __future__ import annotations

from dataclasses import replace

from harness import Setting, Work, arguments, circumstances, gradient_difference, in_a_process, measure, report
from reference_model import make_prompts
from variants import cross_entropy, fan, naive_logprobs, rows, shared


def one_at_a_time(setting: Setting) -> Work:
    """Returns the naive variant with a backward after each completion."""
    work = shared(cross_entropy, route="naive")(setting)
    prompts, texts = make_prompts(setting.family, setting.grid, 1, setting.seed), fan(setting)
    total = texts.loss_mask.sum()

    def step() -> None:
        for row in range(len(texts)):
            one = naive_logprobs(work.vlm, work.model, prompts, rows(texts, row, row + 1))
            (-one.sum() / total).backward()  # type: ignore[no-untyped-call]

    return replace(work, step=step)


VARIANTS = {
    "naive, one by one": one_at_a_time,
    "at once": shared(cross_entropy),
    "chunks of 2": shared(cross_entropy, completion_chunk=2),
    "chunks of 1": shared(cross_entropy, completion_chunk=1),
}

if __name__ == "__main__":
    setting, options = arguments(__doc__, text_tokens=2048)
    found = measure(VARIANTS, setting, second_step=False)  # half a minute each, so a warm-up hardly matters
    gradient, _ = in_a_process(gradient_difference, list(VARIANTS.values()), setting)
    first = found["at once"]
    headline = {
        "chunked_peak_ratio": found["chunks of 1"].peak_mb / first.peak_mb,
        "naive_peak_ratio": found["naive, one by one"].peak_mb / first.peak_mb,
        "chunked_flop_ratio": found["chunks of 1"].gflop / first.gflop,
        "naive_flop_ratio": found["naive, one by one"].gflop / first.gflop,
        "grad_rel_diff": gradient,
    }
    report(headline, found, circumstances(setting), options.json)
