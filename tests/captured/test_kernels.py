"""Every kernel, forward and backward, against float64 on the CPU: on the GPU where there is one, else in Triton's
interpreter.

Triton decides what `@triton.jit` makes when it is imported. The checks therefore run in a process of their own,
which is started with `TRITON_INTERPRET=1` where there is no GPU.
"""

import contextlib
import importlib.util
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.nn.functional import cross_entropy, layer_norm, rms_norm

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"

ROUNDINGS = {torch.float32: 32, torch.float16: 2, torch.bfloat16: 2}
"""How many units of its dtype's eps, of the largest element, a result may be off.

All sums are taken in fp32. In half precision only what leaves a kernel is rounded: the result, and the narrow product
between two wide ones, half a unit each; twice that is allowed. In fp32 every term of a sum of up to 1,100 is rounded as
well, in another order than the reference's.
"""

DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in ROUNDINGS]


@pytest.fixture(scope="module")
def apart() -> Iterator[Callable[..., None]]:
    """Calls a check, with its arguments, in the process that has the kernels."""
    if not importlib.util.find_spec("triton"):
        pytest.skip("not run: needs Triton, which the extra 'test' brings along on Linux")
    if not HAS_CUDA and Version(version("triton")) < Version("3.9") and Version(version("numpy")) >= Version("2.4"):
        pytest.skip("not run: the interpreter of Triton before 3.9 needs numpy before 2.4")
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_CUDA:
            patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            yield lambda check, *arguments: process.submit(check, *arguments).result()


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """`found` is `expected` (float64, on the CPU) but for the roundings of its dtype."""
    allowed = ROUNDINGS[found.dtype] * torch.finfo(found.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=allowed)


def random(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """One tensor a shape, the same ones in every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def exact(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """What the reference is computed from, with gradients."""
    return [tensor.cpu().double().requires_grad_() for tensor in tensors]


def gradient(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


@contextlib.contextmanager
def last_first() -> Iterator[None]:
    """Inside, the interpreter runs a kernel's programs in reverse; a GPU has an order of its own."""
    if HAS_CUDA:
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    forwards = builder.set_grid_idx

    def backwards(*place: int) -> None:
        forwards(*(size - 1 - index for size, index in zip(builder.grid_dim, place, strict=True)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", backwards)
        yield


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor(number, device=DEVICE)


def share_is(mask: torch.Tensor, share: float) -> None:
    """`share` of `mask` is 1, within four standard deviations of as many throws of a coin."""
    assert abs(mask.mean().item() - share) <= 4 * math.sqrt(share * (1 - share) / mask.numel())


# LoRA

ADAPTERS = {
    "one-row": (1, 24, 40, 1),
    "odd": (39, 201, 135, 3),
    "whole-tiles": (32, 256, 256, 16),
    "two-tiles-of-ranks": (34, 300, 128, 20),
    "wide-in": (20, 1100, 130, 4),
    "wide-out": (70, 65, 1101, 5),
}
"""Tokens, width, out and rank."""


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("shape", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_adds_its_product_and_has_its_gradients(apart, dtype, shape, p):
    if dtype == torch.bfloat16 and not HAS_CUDA:
        pytest.skip("not run: Triton's interpreter multiplies matrices of bfloat16 as if they were integers")
    apart(check_adapter, dtype, shape, p)


def check_adapter(dtype: torch.dtype, shape: tuple[int, int, int, int], p: float) -> None:
    from lightweight.captured import kernels

    tokens, width, out, rank = shape
    x, a, b, grad, grad_of_others, whole = random(
        dtype, (tokens, width), (rank, width), (out, rank), (tokens, out), (tokens, width), (tokens, 2 * out)
    )
    dropout = p, seed_of(11), 4
    factor = which_stay(dtype, shape, *dropout).cpu().double() / (1 - p)
    before = whole.clone()
    y = whole[:, out:]  # a part of rows that lie further apart
    inner = kernels.add_adapter_(y, x, a, b, 2.0, *dropout)
    grad_x = grad_of_others.clone()
    grad_a, grad_b = kernels.adapter_backward(grad, inner, x, a, b, grad_x, 2.0, *dropout)

    exact_x, exact_a, exact_b = exact(x, a, b)
    exact_inner = 2 * (exact_x * factor) @ exact_a.t()
    product = exact_inner @ exact_b.t()
    product.backward(grad.cpu().double())
    near(inner, exact_inner.detach())
    near(y, before[:, out:].cpu().double() + product.detach())
    assert torch.equal(whole[:, :out], before[:, :out])
    near(grad_a, gradient(exact_a))
    near(grad_b, gradient(exact_b))
    near(grad_x, grad_of_others.cpu().double() + gradient(exact_x))

    again = kernels.adapter_backward(grad, inner, x, a, b, None, 2.0, *dropout)
    assert torch.equal(again[0], grad_a) and torch.equal(again[1], grad_b)


def which_stay(
    dtype: torch.dtype, shape: tuple[int, int, int, int], p: float, seed: torch.Tensor, site: int
) -> torch.Tensor:
    """1 where dropout keeps an element of x and 0 where it falls: [tokens, width]. Where all else is ones, the gradient
    of x is 0 only there."""
    from lightweight.captured import kernels

    tokens, width, out, rank = shape
    grad, inner, x, a, b = (
        torch.ones(*size, dtype=dtype, device=DEVICE)
        for size in ((tokens, out), (tokens, rank), (tokens, width), (rank, width), (out, rank))
    )
    grad_x = torch.zeros_like(x)
    kernels.adapter_backward(grad, inner, x, a, b, grad_x, 1.0, p, seed, site)
    return (grad_x != 0).float()


@pytest.mark.parametrize("shape", [(80, 201, 135, 3), (80, 1100, 130, 4)], ids=["narrow", "wide"])
def test_which_elements_fall_follows_from_seed_and_site_alone(apart, shape):
    apart(check_dropout, shape)


def check_dropout(shape: tuple[int, int, int, int]) -> None:
    p = 0.25
    kept = which_stay(torch.float16, shape, p, seed_of(11), 4)
    share_is(kept, 1 - p)
    assert kept.unique(dim=0).shape == kept.unique(dim=1).shape == kept.shape, "rows or columns are alike"
    assert torch.equal(kept, which_stay(torch.float16, shape, p, seed_of(11), 4))
    for seed, site in ((11, 5), (1011, 4)):
        other = which_stay(torch.float16, shape, p, seed_of(seed), site)
        share_is((other != kept).float(), 2 * p * (1 - p))


# Cross-entropy

LOGITS = {
    "one-row": (1, 300, 300),
    "one-token-to-choose": (3, 1, 8),
    "padded": (7, 5003, 5056),
    "whole-tile": (2, 4096, 4096),
    "wide": (3, 50_257, 50_304),
}
"""Rows, vocabulary and columns."""


@pytest.mark.parametrize("shape", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_leaves_its_gradient(apart, dtype, shape):
    apart(check_cross_entropy, dtype, shape)


def check_cross_entropy(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    from lightweight.captured import kernels

    rows, vocabulary, columns = shape
    logits, scales = random(dtype, (rows, columns), (rows,))
    logits *= 20  # of which some exponentials would overflow
    scales = scales.float()
    targets = torch.arange(rows, device=DEVICE) * 1000 % vocabulary
    targets[-1] = vocabulary - 1
    (exact_logits,) = exact(logits[:, :vocabulary])
    expected = cross_entropy(exact_logits, targets.cpu(), reduction="none")
    expected.backward(scales.cpu().double())

    near(kernels.cross_entropy_(logits, vocabulary, targets, scales), expected.detach())
    if vocabulary > 1:
        near(logits[:, :vocabulary], gradient(exact_logits))
    else:
        assert not logits.any()
    assert not logits[:, vocabulary:].any()


# Norms

ROWS = {"three-elements": (1, 3), "one-row": (1, 300), "odd": (3, 5, 257), "whole-tile": (4, 512), "wide": (2, 4100)}
"""Shapes of what is taken along the last axis."""


NORMS = {
    "layer": (True, True, 0.0),
    "no-bias": (True, False, 0.0),
    "rms": (False, False, 0.0),
    "one": (False, False, 1.0),
}
"""Whether centred, whether biased, and what is added to the weight."""


@pytest.mark.parametrize(("centred", "biased", "offset"), NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_and_its_gradient(apart, dtype, shape, centred, biased, offset):
    apart(check_norm, dtype, shape, centred, biased, offset)


def check_norm(dtype: torch.dtype, shape: tuple[int, ...], centred: bool, biased: bool, offset: float) -> None:
    from lightweight.captured import kernels

    width = shape[-1:]
    x, grad, weight, bias = random(dtype, shape, shape, width, width)
    exact_x, exact_weight, exact_bias = exact(x, weight, bias)
    if centred:
        expected = layer_norm(exact_x, width, exact_weight, exact_bias if biased else None, 1e-5)
    else:
        expected = rms_norm(exact_x, width, exact_weight + offset, 1e-5)
    expected.backward(grad.cpu().double())

    norm = kernels.Norm(weight, bias if biased else None, 1e-5, centred, offset)
    found, statistics = kernels.norm(x, norm)
    near(found, expected.detach())
    rows = exact_x.detach().flatten(0, -2)
    mean = rows.mean(1) if centred else torch.zeros(len(rows), dtype=torch.float64)
    near(statistics[:, 0], mean)
    near(statistics[:, 1], ((rows - mean[:, None]).square().mean(1) + 1e-5).rsqrt())
    near(kernels.norm_backward(grad, x, norm, statistics), gradient(exact_x))


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("biased", [True, False], ids=["biased", "unbiased"])
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_together_with_the_sum_it_is_taken_of(apart, dtype, shape, biased, p):
    apart(check_add_norm, dtype, shape, biased, p)


def check_add_norm(dtype: torch.dtype, shape: tuple[int, ...], biased: bool, p: float) -> None:
    from lightweight.captured import kernels

    width, seed = shape[-1:], seed_of(11)
    branch, residual, grad, grad_of_others, weight, bias = random(dtype, shape, shape, shape, shape, width, width)
    made = kernels.Sum(kernels.Norm(weight, bias if biased else None, 1e-5, True), None, p, 9)
    kept = kernels.add_norm(torch.ones_like(branch), torch.zeros_like(residual), made, seed).total != 0
    share_is(kept.float(), 1 - p)
    factor = kept.cpu().double() / (1 - p)
    summed = kernels.add_norm(branch, residual, made, seed)
    grad_branch, grad_residual = kernels.add_norm_backward([grad, grad_of_others], None, None, summed, made, seed)

    total = summed.total
    exact_branch, exact_residual, exact_total, exact_weight, exact_bias = exact(branch, residual, total, weight, bias)
    near(total, (exact_residual + exact_branch * factor).detach())
    expected = layer_norm(exact_total, width, exact_weight, exact_bias if biased else None, 1e-5)  # of what is kept
    expected.backward(grad.cpu().double() + grad_of_others.cpu().double())
    near(summed.result, expected.detach())
    near(grad_residual, gradient(exact_total))
    near(grad_branch, gradient(exact_total) * factor)

    exact_total.grad = None
    layer_norm(exact_total, width, exact_weight, None, 1e-5).backward(grad.cpu().double())
    near(kernels.add_norm_backward([grad], None, None, summed, made, seed)[1], gradient(exact_total))


@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["weight", "one-plus-weight"])
@pytest.mark.parametrize("after", [False, True], ids=["plain", "normed-before-it-is-added"])
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_goes_on_beside_its_norm(apart, dtype, shape, after, offset):
    apart(check_sum, dtype, shape, after, offset)


def check_sum(dtype: torch.dtype, shape: tuple[int, ...], after: bool, offset: float) -> None:
    from lightweight.captured import kernels

    width, seed = shape[-1:], seed_of(11)
    branch, residual, grad, grad_of_total, weight, other = random(dtype, shape, shape, shape, shape, width, width)
    norms = [kernels.Norm(each, None, 1e-5, False, offset) for each in (weight, other)]
    made = kernels.Sum(norms[0], norms[1] if after else None)
    summed = kernels.add_norm(branch, residual, made, seed)
    grad_branch, grad_residual = kernels.add_norm_backward([grad], grad_of_total, branch, summed, made, seed)

    exact_branch, exact_residual, exact_weight, exact_other = exact(branch, residual, weight, other)
    added = rms_norm(exact_branch, width, exact_other + offset, 1e-5) if after else exact_branch
    total = exact_residual + added
    near(summed.total, total.detach())
    (rounded,) = exact(summed.total)  # of what is kept
    result = rms_norm(rounded, width, exact_weight + offset, 1e-5)
    near(summed.result, result.detach())
    result.backward(grad.cpu().double())
    total.backward(gradient(rounded) + grad_of_total.cpu().double())
    near(grad_residual, gradient(exact_residual))
    near(grad_branch, gradient(exact_branch))


# Activations

ELEMENTS = {"one": (1,), "odd": (7, 3), "a-program": (2, 1024), "and-one-more": (2049,), "many": (3, 5, 300)}


@pytest.mark.parametrize("shape", ELEMENTS.values(), ids=ELEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_is_torchs_bit_by_bit(apart, dtype, shape):
    apart(check_relu, dtype, shape)


def check_relu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    from lightweight.captured import kernels

    x, grad = random(dtype, shape, shape)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=dtype, device=DEVICE)[: x.numel()]
    x.view(-1)[: len(special)] = special
    found, positive = kernels.relu(x)
    torch.testing.assert_close(found, torch.relu(x), rtol=0, atol=0, equal_nan=True)
    assert positive.numel() == -(-x.numel() // 8)
    assert torch.equal(kernels.relu_backward(grad, positive), torch.where(x > 0, grad, 0))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("shape", ELEMENTS.values(), ids=ELEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_activation_and_its_gradients(apart, dtype, shape, activation, gated):
    apart(check_gate, dtype, shape, activation, gated)


def check_gate(dtype: torch.dtype, shape: tuple[int, ...], activation: Any, gated: bool) -> None:
    from lightweight.captured import activations, kernels

    width = shape[-1]
    both, other, grad = random(dtype, (*shape[:-1], 2 * width), shape, shape)
    apart = both[..., :width].clone(), other
    for order, (gate, up) in (
        (contextlib.nullcontext, both.clone().split(width, -1)),
        (last_first, both.split(width, -1)),
        (contextlib.nullcontext, apart),
    ):
        up = up if gated else None
        sources = exact(gate) if up is None else exact(gate, up)
        expected = activations.FUNCTIONS[activation](sources[0])
        if gated:
            expected = expected * sources[1]
        expected.backward(grad.cpu().double())
        near(kernels.gate(gate, up, activation), expected.detach())
        with order():
            grads = kernels.gate_backward(grad, gate, up, activation)
        for found, reference in zip(grads, sources, strict=False):
            assert found is not None
            near(found, gradient(reference))
        assert (grads[1] is None) == (not gated)
        are_one = gated and gate.dim() > 1 and gate is not apart[0]
        assert (grads[0].data_ptr() == gate.data_ptr()) is are_one  # written over the two


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("shape", [(39, 201, 3), (80, 256, 16)], ids=["odd", "whole-tiles"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gates_gradients_come_with_an_adapters(apart, dtype, shape, activation):
    if dtype == torch.bfloat16 and not HAS_CUDA:
        pytest.skip("not run: Triton's interpreter multiplies matrices of bfloat16 as if they were integers")
    apart(check_gate_and_adapter, dtype, shape, activation)


def check_gate_and_adapter(dtype: torch.dtype, shape: tuple[int, int, int], activation: Any) -> None:
    from lightweight.captured import activations, kernels

    tokens, width, rank = shape
    both, grad, reached, a = random(dtype, (tokens, 2 * width), (tokens, width), (tokens, rank), (rank, width))
    again, again_up = both.clone().split(width, -1)
    gate, up = both.split(width, -1)
    exact_gate, exact_up, exact_a = exact(gate, up, a)
    product = activations.FUNCTIONS[activation](exact_gate) * exact_up
    inner = 2 * product @ exact_a.t()
    torch.autograd.backward([product, inner], [grad.cpu().double(), reached.cpu().double()])
    found = kernels.gate_project_backward(grad, kernels.Reached(reached, a, 2.0), gate, up, activation)
    for each, reference in zip(found, (exact_gate, exact_up, exact_a), strict=True):
        near(each, gradient(reference))
    assert found[0].data_ptr() == gate.data_ptr()
    with last_first():
        reverse = kernels.gate_project_backward(grad, kernels.Reached(reached, a, 2.0), again, again_up, activation)
    assert all(torch.equal(one, other) for one, other in zip(found, reverse, strict=True))


# Rotary embeddings

HEADS = {
    "one": (1, 1, 1, 1, 4, 4),
    "odd": (2, 3, 3, 1, 12, 12),
    "grouped": (2, 5, 8, 2, 64, 64),
    "part": (2, 3, 4, 2, 20, 8),
}
"""Rows, tokens, heads of queries and of keys, width, and how much of it is turned."""


@pytest.mark.parametrize("where", ["in place", "elsewhere"])
@pytest.mark.parametrize("normed", [None, 0.0, 1.0], ids=["turned", "normed", "normed-by-one-plus"])
@pytest.mark.parametrize(
    "pairing", [(False, False), (True, False), (True, True)], ids=["halves", "neighbours", "repeated"]
)
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_keys_are_turned_and_turned_back(apart, dtype, shape, pairing, normed, where):
    if normed is not None and shape[4] != shape[5]:
        pytest.skip("not a case: heads are normed whole")
    apart(check_rotation, dtype, shape, pairing, normed, where == "in place")


def check_rotation(
    dtype: torch.dtype, shape: tuple[int, ...], pairing: tuple[bool, bool], offset: float | None, in_place: bool
) -> None:
    from lightweight.captured import kernels, rotary

    rows, time, heads, k_heads, width, turned_width = shape
    both = heads + k_heads
    joint, grads, angles = random(
        dtype, (rows, time, both + 1, width), (rows, time, both, width), (1, time, turned_width)
    )
    weights = [(torch.rand(width, generator=torch.Generator().manual_seed(n)) + 0.5).to(DEVICE, dtype) for n in (1, 2)]
    if offset is not None:  # as in all models: what is turned by two angles at once cannot be turned back
        half = angles[..., : turned_width // 2]
        angles = half.repeat_interleave(2, -1) if pairing == (True, False) else torch.cat([half, half], -1)
    cos, sin = (2 * angles.float()).cos().to(dtype), (2 * angles.float()).sin().to(dtype)
    turns = rotary.Turns(cos, sin, *pairing)
    q, k = (part.transpose(1, 2) for part in joint.split([heads, k_heads, 1], 2)[:2])
    grad_q, grad_k = (part.transpose(1, 2) for part in grads.split([heads, k_heads], 2))
    norms = None
    if offset is not None:
        norms = kernels.Norm(weights[0], None, 1e-5, False, offset), kernels.Norm(weights[1], None, 1e-5, False, offset)

    exact_q, exact_k = exact(q, k)
    exact_turns = turns._replace(cos=cos.cpu().double(), sin=sin.cpu().double())
    sources = [exact_q, exact_k]
    if offset is not None:
        scales = [weight.cpu().double() + offset for weight in weights]
        sources = [rms_norm(x, (width,), scale, 1e-5) for x, scale in zip(sources, scales, strict=True)]
    expected = [rotary.turned(x, exact_turns) for x in sources]
    torch.autograd.backward(expected, [grad_q.cpu().double(), grad_k.cpu().double()])

    rest = joint[:, :, both:].clone()
    results = (q, k) if in_place else (torch.empty_like(q), torch.empty_like(k))
    factors = rotary.rotate((q, k), results, turns, norms)
    assert torch.equal(joint[:, :, both:], rest)
    new_grads = torch.full_like(joint, math.nan)
    new_q, new_k = (part.transpose(1, 2) for part in new_grads.split([heads, k_heads, 1], 2)[:2])
    rotary.rotate_backward((grad_q, grad_k), (q, k), (new_q, new_k), turns, norms, factors, turned=in_place)
    for found, reference in zip(results, expected, strict=True):
        near(found, reference.detach())
    assert new_grads[:, :, both:].isnan().all()
    for found, reference in zip((new_q, new_k), (exact_q, exact_k), strict=True):
        near(found, gradient(reference))


# Compiling ahead


def test_compiling_launches_nothing_and_compiles_all_that_would_have_been(apart):
    apart(check_compiling)


def check_compiling() -> None:
    import triton

    from lightweight.captured import kernels, launching

    def adapt(width: int) -> bool:
        """Whether y was changed."""
        x, a, b, grad, y = random(torch.float16, (48, width), (40, width), (width, 40), (48, width), (48, width))
        before = y.clone()
        inner = kernels.add_adapter_(y, x, a, b, 2.0, 0.1, seed_of(11), 4)
        kernels.adapter_backward(grad, inner, x, a, b, torch.zeros_like(x), 2.0, 0.1, seed_of(11), 4)
        return not torch.equal(y, before)

    compiled = []
    if HAS_CUDA:
        triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name)
    with launching.compiling():
        assert not adapt(256), "a kernel was launched"
        adapt(1280)
    assert len(compiled) == (4 if HAS_CUDA else 0), compiled  # a rank that nothing else here has
    assert adapt(256), "no kernel was launched"
    adapt(1280)
    assert len(compiled) == (4 if HAS_CUDA else 0), f"compiled anew: {compiled[4:]}"
