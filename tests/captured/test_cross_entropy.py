import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from lightweight.captured import cross_entropy as loss
from lightweight.captured.cross_entropy import linear_cross_entropy


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator, dtype=torch.float64).float().requires_grad_()
    head = torch.randn(101, 16, generator=generator).requires_grad_()
    bias = torch.randn(101, generator=generator).requires_grad_()
    targets = torch.randint(101, (37,), generator=generator)
    weights = torch.rand(37, generator=generator) / 37
    weights[5:9] = 0.0
    return hidden, head, bias, targets, weights


def reference(hidden, head, bias, targets, weights):
    return (cross_entropy(linear(hidden, head, bias), targets, reduction="none") * weights).sum()


@pytest.mark.parametrize("tokens_a_chunk", [1, 7, 37, 1000])
def test_loss_and_gradients_are_those_of_the_whole_logits(problem, monkeypatch, tokens_a_chunk):
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: tokens_a_chunk)
    *tensors, targets, weights = problem
    expected = reference(*tensors, targets, weights)  # type: ignore[call-arg]
    wanted = torch.autograd.grad(3.0 * expected, tensors)
    found = linear_cross_entropy(*tensors, targets, weights)  # type: ignore[call-arg]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(3.0 * found, tensors), wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_none_is_computed(problem):
    hidden, head, _, targets, weights = problem
    found = linear_cross_entropy(hidden, head.detach(), None, targets, weights)
    assert found.grad_fn is not None
    (gradient,) = torch.autograd.grad(found, [hidden])
    (expected,) = torch.autograd.grad(reference(hidden, head, None, targets, weights), [hidden])
    assert torch.allclose(gradient, expected, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(linear_cross_entropy(hidden, head, None, targets, weights), found)


def test_tokens_without_weight_change_nothing(problem):
    hidden, head, bias, targets, weights = problem
    kept = weights != 0
    whole = linear_cross_entropy(hidden, head, bias, targets, weights)
    part = linear_cross_entropy(hidden[kept], head, bias, targets[kept], weights[kept])
    assert whole.item() == pytest.approx(part.item(), rel=1e-6)
    assert linear_cross_entropy(hidden, head, bias, targets, torch.zeros_like(weights)).item() == 0.0


@pytest.fixture
def nan_where_nothing_was_written():
    torch.use_deterministic_algorithms(True)  # which fills what `torch.empty` gives
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_was_in_the_memory_before_changes_nothing(problem, nan_where_nothing_was_written, dtype):
    *tensors, targets, weights = problem
    given = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    assert torch.empty(1).isnan()
    found = linear_cross_entropy(*given, targets, weights)  # type: ignore[call-arg]
    for gradient in torch.autograd.grad(found, given):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_survive_small_weights_and_large_loss_scales(problem, dtype):
    """A thousandth of a token's weight times 2^16, as in fp16 training; the loss itself is fp32."""
    hidden, head, bias, targets, weights = problem
    half = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, head, bias)]
    whole = [tensor.detach().float().requires_grad_() for tensor in half]
    found = linear_cross_entropy(*half, targets, weights / 1000)  # type: ignore[call-arg]
    assert found.dtype == torch.float32
    gradients = torch.autograd.grad(found * 2.0**16, half)
    expected = torch.autograd.grad(reference(*whole, targets, weights / 1000) * 2.0**16, whole)  # type: ignore[call-arg]
    assert found.item() == pytest.approx(reference(*whole, targets, weights / 1000).item(), rel=1e-2)  # type: ignore[call-arg]
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.float() - theirs).norm() < 2e-2 * theirs.norm()


def test_autocast_rounds_the_logits_but_not_the_sum_over_tokens(problem):
    """A loss of 5.354 was recorded as 5.344: bf16 keeps three digits."""
    hidden, head, bias, targets, weights = problem
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, head, bias, targets, weights)
        logits = linear(hidden, head, bias)
        expected = (cross_entropy(logits.float(), targets, reduction="none") * weights).sum()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert found.item() != found.bfloat16().item()
    for gradient, tensor in zip(torch.autograd.grad(found, [hidden, head, bias]), (hidden, head, bias), strict=True):
        assert gradient.dtype == tensor.dtype == torch.float32


def test_logits_live_no_longer_than_their_chunk(problem, monkeypatch):
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            result = function(*arguments, **(options or {}))
            for tensor in result if isinstance(result, tuple) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] == 101:
                    largest = max(largest, tensor.shape[0])
            return result

    hidden, head, _, targets, weights = problem
    hidden, head = hidden[:, :4], head.detach()[:, :4]  # narrower than a chunk is high
    with Watch():
        linear_cross_entropy(hidden, head, None, targets, weights).backward()
    assert largest == 8


def test_a_chunk_has_whole_tiles_of_tokens_and_enough_of_them():
    assert loss.chunk_tokens(50_272, 2) == 640  # within 64 MiB
    assert loss.chunk_tokens(262_144, 2) == loss.chunk_tokens(50_272, 4) == 512
    assert loss.chunk_tokens(384, 2) % loss.TILE == 0
