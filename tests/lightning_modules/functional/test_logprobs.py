"""Token log-probabilities against a slow loop, chunked against whole."""

import math

import pytest
import torch
from torch import Tensor

from vidreason.lightning_modules.functional.logprobs import chunked_token_logprobs, token_logprobs


def slow(row: list[float], token: int, temperature: float, suppressed: set[int]) -> tuple[float, float]:
    weights = {v: math.exp(x / temperature) for v, x in enumerate(row) if v not in suppressed}
    total = sum(weights.values())
    return math.log(weights[token] / total), -sum(w / total * math.log(w / total) for w in weights.values())


def entropy_of(logits: Tensor, ids: Tensor, temperature: float = 1.0, suppressed: Tensor | None = None) -> Tensor:
    scores = chunked_token_logprobs(
        logits, ids, lambda x: x, chunk_size=1000, temperature=temperature, suppressed=suppressed, with_entropy=True
    )
    assert scores.entropy is not None
    return scores.entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("suppressed", [(), (0, 3)])
def test_against_a_slow_loop(temperature: float, suppressed: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=generator) * 2
    ids = torch.tensor([[1, 2, 4], [5, 6, 1]])
    drop = torch.tensor(suppressed, dtype=torch.int64) if suppressed else None
    logprobs = token_logprobs(logits, ids, temperature, drop)
    entropy = entropy_of(logits, ids, temperature, drop)
    for b in range(2):
        for t in range(3):
            expected = slow(logits[b, t].tolist(), int(ids[b, t]), temperature, set(suppressed))
            assert (logprobs[b, t].item(), entropy[b, t].item()) == pytest.approx(expected, abs=1e-5)


def test_known_numbers_and_types() -> None:
    logits = torch.tensor([[math.log(1.0), math.log(3.0)]])
    assert token_logprobs(logits, torch.tensor([1])).item() == pytest.approx(math.log(0.75))
    assert token_logprobs(logits, torch.tensor([1]), 0.5).item() == pytest.approx(math.log(0.9))
    assert entropy_of(torch.zeros(1, 8), torch.tensor([0])).item() == pytest.approx(math.log(8))
    assert token_logprobs(logits.bfloat16(), torch.tensor([1])).dtype == torch.float32
    assert token_logprobs(logits.double(), torch.tensor([1])).dtype == torch.float64
    assert token_logprobs(logits, torch.tensor([1]), suppressed=torch.tensor([1])).item() == -math.inf


def test_suppressed_tokens_leave_gradients_finite() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    drop = torch.tensor([2, 5])
    ids = torch.tensor([0, 1, 3, 4])
    (entropy_of(logits, ids, suppressed=drop).sum() + token_logprobs(logits, ids, suppressed=drop).sum()).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, drop] == 0).all()
    assert (logits.grad[:, 0] != 0).all()


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 64])
@pytest.mark.parametrize("suppressed", [None, torch.tensor([0])])
def test_chunks_equal_the_whole_in_value_and_gradient(chunk_size: int, suppressed: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    ids = torch.randint(1, 9, (2, 5), generator=generator)
    seen: list[int] = []

    def run(chunked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

        def head(states: Tensor) -> Tensor:
            seen.append(len(states))
            return torch.tanh(states @ w.T) * 3

        if chunked:
            scores = chunked_token_logprobs(
                h, ids, head, chunk_size=chunk_size, temperature=0.8, suppressed=suppressed, with_entropy=True
            )
            assert scores.entropy is not None
            logprobs, entropy = scores.logprobs, scores.entropy
        else:
            logits = head(h.reshape(10, 4)).reshape(2, 5, 9)
            logprobs, entropy = token_logprobs(logits, ids, 0.8, suppressed), entropy_of(logits, ids, 0.8, suppressed)
        (logprobs.sin().sum() + entropy.square().sum()).backward()
        assert h.grad is not None
        assert w.grad is not None
        return logprobs.detach(), entropy.detach(), h.grad, w.grad

    whole = run(chunked=False)
    seen.clear()
    for a, b in zip(run(chunked=True), whole, strict=True):
        torch.testing.assert_close(a, b)
    assert max(seen) <= chunk_size
    with torch.no_grad():
        plain = chunked_token_logprobs(hidden, ids, lambda x: x @ weight.T, chunk_size=chunk_size)
    assert plain.entropy is None
    torch.testing.assert_close(plain.logprobs, token_logprobs(hidden @ weight.T, ids))
    likeliest = (hidden @ weight.T).argmax(-1)
    for given in (ids, likeliest):
        greedy = chunked_token_logprobs(hidden, given, lambda x: x @ weight.T, chunk_size=chunk_size).greedy
        assert torch.equal(greedy, (given == likeliest).double())


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8])
def test_several_tokens_from_one_state(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (9, 4)))
    state, ids = torch.tensor([0, 0, 2, 3, 3, 3, 4]), torch.randint(1, 9, (7,), generator=generator)
    gradients = []
    seen: list[int] = []

    def head(states: Tensor) -> Tensor:
        seen.append(len(states))
        return states @ weight.T

    for shared in (True, False):
        h = hidden.clone().requires_grad_()
        if shared:
            found = chunked_token_logprobs(
                h, ids, head, chunk_size=chunk_size, suppressed=torch.tensor([0]), with_entropy=True, state=state
            )
            assert sum(seen) == 5, "a state goes through the head once"
        else:
            found = chunked_token_logprobs(h[state], ids, head, suppressed=torch.tensor([0]), with_entropy=True)
        assert found.entropy is not None
        gradients.append((found.logprobs.detach(), found.entropy.detach()))
        (found.logprobs.sin().sum() + found.entropy.square().sum()).backward()
        assert h.grad is not None
        gradients[-1] += (h.grad,)  # type: ignore[assignment]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="non-decreasing"):
        chunked_token_logprobs(hidden, ids, head, state=state.flip(0))


def test_chunks_do_not_keep_the_logits() -> None:
    hidden = torch.randn(64, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    weight = torch.randn(1000, 8, generator=torch.Generator().manual_seed(4))
    ids = torch.zeros(64, dtype=torch.int64)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_token_logprobs(hidden, ids, lambda x: x @ weight.T, chunk_size=16)
        largest = max(saved)
        token_logprobs(hidden @ weight.T, ids)
    assert largest < 16 * 1000
    assert max(saved) == 64 * 1000


def test_no_tokens_and_wrong_arguments() -> None:
    empty = chunked_token_logprobs(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), lambda x: x)
    assert empty.logprobs.shape == (2, 0)
    logits, ids = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(logits, ids, 0.0)
    with pytest.raises(ValueError, match="do not fit"):
        token_logprobs(logits, ids[:1])
    with pytest.raises(ValueError, match="chunk_size"):
        chunked_token_logprobs(logits, ids, lambda x: x, chunk_size=0)
