"""What does this card do at each size? `lightweight calibrate`: some two minutes of kernels, for forecasts of time.

Every kernel is timed among others of its kind in a CUDA graph, as a captured step runs it, so that the gap between two
is in its time. Each launch gets memory that the ones before it did not touch, as far as the card's cache reaches.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product as every
from types import SimpleNamespace
from typing import Any

from lightweight import preload  # isort: skip  # noqa: F401  # before bitsandbytes

import torch
from torch import Tensor

from lightweight import files, targets
from lightweight.captured import hopper, joined, launching, rotary
from lightweight.captured import kernels as ours
from lightweight.captured.kernels import Norm, Reached, Sum
from lightweight.captured.rotary import Turns
from lightweight.child.worker import describe_device
from lightweight.cli import stock_pace
from lightweight.cli.terminal import refuse, show
from lightweight.forecast import calibration, work
from lightweight.forecast.calibration import LEAST_SECONDS, Calibration, CalibrationError, TimedKernel, limit
from lightweight.forecast.work import Kernel
from lightweight.internals import torch as torch_internals
from lightweight.targets import MiB, Rates

POOL_BYTES = 2048 * MiB
"""Memory that factors and results are taken from, one after the other."""

CACHE_BYTES = 64 * MiB
"""So much is touched before anything is touched again, somewhat more than an H100 caches: of what a kernel of a step
reads, some was just written, and some long ago."""

GRAPH_SECONDS = 1e-3
LAUNCHES = 6, 192
"""How long a graph of one kind of kernel is to take, and how many launches it has at the least and at the most."""

REPLAYS = 3

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Launch = Callable[[], object]


@dataclass(frozen=True)
class _Candidate:
    """A kernel to be timed: launches of it, on different memory."""

    kernel: Kernel
    launches: Sequence[Launch]


class Bench:
    """The card, and memory to measure with."""

    def __init__(self, rates: Rates, device: str = "cuda", pool_bytes: int = POOL_BYTES) -> None:
        self.rates, self.device = rates, device
        self._pools = {
            dtype: torch.empty(pool_bytes // 4, device=device, dtype=dtype)
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
        }
        self._at: dict[torch.dtype, int] = dict.fromkeys(self._pools, 0)

    def refill(self) -> None:
        """Draw the numbers anew: kernels write to what they are given, and a card is faster over zeros."""
        for pool in self._pools.values():
            pool.normal_()

    def tensor(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A tensor of normal numbers, of the memory that was given out the longest time ago. Others may share it."""
        pool, count = self._pools[dtype], math.prod(shape)
        if count > pool.numel():
            return torch.randn(shape, device=self.device, dtype=dtype)
        if self._at[dtype] + count > pool.numel():
            self._at[dtype] = 0
        begin = self._at[dtype]
        self._at[dtype] += -(-count // 256) * 256
        return pool[begin : begin + count].view(shape)

    def copies(self, count: int) -> int:
        """On how many different pieces of memory a kernel that moves so many bytes is launched."""
        return max(1, min(16, -(-CACHE_BYTES // count)))

    def sample(self, candidate: _Candidate) -> TimedKernel:
        """The candidate's seconds."""
        kernel, launches = candidate.kernel, candidate.launches
        expected = max(2 * limit(kernel, self.rates), LEAST_SECONDS)
        count = min(max(round(GRAPH_SECONDS / expected), LAUNCHES[0]), LAUNCHES[1])
        seconds = float(f"{self._seconds(launches, count):.4g}")  # no more digits than a second run would repeat
        return TimedKernel(**kernel._asdict(), seconds=seconds)

    def _seconds(self, launches: Sequence[Launch], count: int) -> float:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            launches[0]()  # compiled, and its workspace allocated, outside of the graph
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            graph.capture_begin()
            for index in range(count):
                launches[index % len(launches)]()
            graph.capture_end()
            graph.replay()
            milliseconds = []
            for _ in range(REPLAYS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                milliseconds.append(begin.elapsed_time(end))
            graph.reset()
        return float(sorted(milliseconds)[REPLAYS // 2]) / 1e3 / count


def command(options: argparse.Namespace) -> int:
    """Time the GPU at hand and store what was found; the exit status."""
    try:
        found = run(progress=show)
        files.write(options.output, calibration.written(found))
    except CalibrationError as error:
        return refuse(error)
    except OSError as error:
        return refuse(CalibrationError(f"--output {options.output}: cannot be written ({error.strerror})"))
    finally:
        show("")
    print(f"{found.device}: {len(found.samples):,} kernels timed; stored in {options.output}")
    return 0


def run(progress: Callable[[str], None] = lambda text: None) -> Calibration:
    """The calibration of the GPU at hand. Raises CalibrationError where there is none, or its data sheet is unknown."""
    if not torch.cuda.is_available():
        raise CalibrationError("calibrate: needs a GPU, and torch finds none here")
    device = describe_device(0)
    rates = targets.rates(device.name)
    if rates is None:
        raise CalibrationError(f"{device.name}: its data sheet is not in lightweight/targets.py: add it to RATES")
    bench = Bench(rates)
    samples: list[TimedKernel] = []
    for name, candidates in PARTS.items():
        bench.refill()
        for candidate in candidates(bench):
            progress(f"{device.name}: {name} {candidate.kernel.kind} {list(candidate.kernel.shape)}")
            samples.append(bench.sample(candidate))
        torch.cuda.empty_cache()
    progress(f"{device.name}: the host's pace")
    return Calibration(
        device=device.name,
        driver=device.driver,
        torch=torch.__version__,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        host=platform.processor() or platform.machine(),
        operator_seconds=stock_pace.operator_seconds(),
        samples=tuple(samples),
    )


# Products

THIN, WIDE, HEADS = (8, 16, 64), (256, 1024, 2048, 4096, 8192), (32_768, 131_072)
"""Sizes of a product: an adapter's rank, a layer's width or a pass's tokens, a vocabulary."""

BETWEEN = 128
"""How many products of sizes between those are timed. A model's widths are multiples of 64 and seldom powers of two:
how well tiles fit them differs from one to the next."""


def sizes_between() -> list[tuple[int, int, int]]:
    """[m, n, k], multiples of 64, evenly scattered over the logarithms of all that are wide."""
    low, high = math.log2(WIDE[0]), math.log2(WIDE[-1])
    drawn = torch.quasirandom.SobolEngine(3, scramble=True, seed=0).draw(BETWEEN).double()
    rounded = torch.exp2(low + (high - low) * drawn).div(64).round().long() * 64
    return list(dict.fromkeys((m, n, k) for m, n, k in rounded.tolist()))


def product_sizes() -> list[tuple[int, int, int]]:
    """[m, n, k]: products of wide factors, with one thin side, and those of a head with its few tokens."""
    sizes = list(dict.fromkeys([*every(WIDE, WIDE, WIDE), *sizes_between()]))
    for thin, one, other in every(THIN, WIDE, WIDE):
        sizes += [(thin, one, other), (one, thin, other), (one, other, thin)]
    for tokens, width, vocabulary in every((128, 256, 1024, 4096), (1024, 2048, 4096), HEADS):
        sizes += [(tokens, vocabulary, width), (tokens, width, vocabulary)]
    return sizes + [(32_768, n, k) for n, k in every((1024, 4096), (1024, 4096))]


def _products(bench: Bench) -> Iterator[_Candidate]:
    for layout, sizes in every(("nt", "nn", "tn"), product_sizes()):
        yield _product(bench, "bfloat16", layout, sizes)
    for layout, m, n, k in every(("nt", "nn"), WIDE[1:], WIDE[1:], (8, 16, 64, 1024, 4096)):
        yield _product(bench, "bfloat16", layout, (m, n, k), is_added=True)
    for layout, sizes in every(("nt", "nn", "tn"), every(WIDE, WIDE, WIDE)):
        if math.prod(sizes) <= 2**35:  # what is larger is as fast
            yield _product(bench, "float32", layout, sizes)
    for layout, sizes in every(("nt", "nn"), [*every(WIDE, WIDE, WIDE), *sizes_between()[:64]]):
        if math.prod(sizes) <= 2**35:
            yield _product(bench, "float16", layout, sizes)


def _product(
    bench: Bench, dtype: str, layout: str, sizes: tuple[int, int, int], *, is_added: bool = False
) -> _Candidate:
    m, n, k = sizes
    of = DTYPES[dtype]
    kernel = work.product(layout, dtype, m, n, k, of.itemsize, is_added=is_added)

    def launch() -> Launch:
        first = bench.tensor(k, m, dtype=of).t() if layout[0] == "t" else bench.tensor(m, k, dtype=of)
        second = bench.tensor(n, k, dtype=of).t() if layout[1] == "t" else bench.tensor(k, n, dtype=of)
        result = torch.empty(m, n, dtype=of, device=bench.device)
        return partial(result.addmm_, first, second) if is_added else partial(torch.mm, first, second, out=result)

    return _Candidate(kernel, [launch() for _ in range(bench.copies(kernel.bytes))])


# Attention

ATTENTION = [
    (rows, length, width)
    for length, width in every((128, 256, 512, 1024, 2048, 4096, 8192), (64, 128, 256))
    for rows in (2, 8, 32, 128, 512)
    if 2**12 <= rows * length <= 2**17 and rows * length * length * width <= 2**36
]
"""[rows x heads], tokens, width of a head."""


def _attentions(bench: Bench) -> Iterator[_Candidate]:
    cudnn = torch.cuda.get_device_capability() in ((9, 0), (10, 0))
    for rows, length, width in ATTENTION:
        heads = min(rows, 8)
        query, key, value = (
            torch.randn(rows // heads, length, heads, width, device=bench.device, dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(3)
        )
        mask = torch.zeros(1, 1, length, length, device=bench.device, dtype=torch.bfloat16)
        for name, bias in (("flash", None), ("efficient", mask), ("efficient", None), ("cudnn", None)):
            if name == "cudnn" and (not cudnn or width > 128 or length < 256):
                continue
            bias = None if bias is None else bias.expand(rows // heads, heads, length, length)
            forward, backward = torch_internals.attention_kernel(name, (query, key, value), bias)
            sizes = (rows, length, length, width)
            how = {"causal": bias is None, "masked": bias is not None}
            yield _Candidate(work.attention(name, "bfloat16", sizes, backward=False, **how), [forward])
            yield _Candidate(work.attention(name, "bfloat16", sizes, backward=True, **how), [backward])


# Passes over memory

SIZES = [2**power for power in (12, 16, 18, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30)]
"""Bytes that a pass reads and writes together."""


def _passes(bench: Bench) -> Iterator[_Candidate]:
    for size in SIZES:
        numbers = size // 2
        for kind, make in PASSES.items():
            yield _Candidate(work.a_pass(kind, size), [make(bench, numbers) for _ in range(bench.copies(size))])
        yield _dequantization(bench, numbers)


def _elementwise(bench: Bench, numbers: int) -> Launch:
    first, second = (bench.tensor(numbers // 3) for _ in range(2))
    return partial(torch.mul, first, second, out=torch.empty_like(first))


def _strided(bench: Bench, numbers: int) -> Launch:
    """Heads multiplied by what they share, as rotary embeddings are."""
    length = max(1, numbers // (2 * 8 * 128 + 128))
    heads = bench.tensor(1, length, 8, 128)
    shared, result = bench.tensor(1, 1, length, 128), torch.empty_like(heads).transpose(1, 2)
    return partial(torch.mul, heads.transpose(1, 2), shared, out=result)


def _concatenation(bench: Bench, numbers: int) -> Launch:
    """The halves of heads, the other way round."""
    length = max(1, numbers // (2 * 8 * 128))
    heads = bench.tensor(1, length, 8, 128)
    result = torch.empty_like(heads).transpose(1, 2)
    heads = heads.transpose(1, 2)
    return partial(torch.cat, (heads[..., 64:], heads[..., :64]), -1, out=result)


def _reduction_of_rows(bench: Bench, numbers: int) -> Launch:
    of = bench.tensor(max(1, numbers // 1024), 1024)
    return partial(torch.sum, of, -1, out=of.new_empty(of.shape[0]))


def _reduction_of_columns(bench: Bench, numbers: int) -> Launch:
    of = bench.tensor(32, max(1, numbers // 33))
    return partial(torch.sum, of, 0, out=of.new_empty(of.shape[1]))


def _row_by_row(bench: Bench, numbers: int) -> Launch:
    of = bench.tensor(max(1, numbers // 4096), 2048)
    return partial(torch.softmax, of, -1)


PASSES: dict[str, Callable[[Bench, int], Launch]] = {
    "elementwise": _elementwise,
    "strided": _strided,
    "concatenation": _concatenation,
    "reduction of rows": _reduction_of_rows,
    "reduction of columns": _reduction_of_columns,
    "row by row": _row_by_row,
}


def _dequantization(bench: Bench, numbers: int) -> _Candidate:
    from bitsandbytes import functional

    rows = max(1, numbers * 4 // 5 // 1024)
    packed, state = functional.quantize_4bit(bench.tensor(rows, 1024), blocksize=64, quant_type="nf4")
    size = packed.numel() + rows * 1024 * 2
    copies = [packed.clone() for _ in range(bench.copies(size))]
    return _Candidate(
        work.a_pass("dequantization", size), [partial(functional.dequantize_4bit, each, state) for each in copies]
    )


# Kernels of ours


def _ours(bench: Bench) -> Iterator[_Candidate]:
    yield from _launched(bench, list(our_calls(bench)))


def _our_attention(bench: Bench) -> Iterator[_Candidate]:
    if torch.cuda.get_device_capability() == hopper.CAPABILITY:
        yield from _launched(bench, list(attention_calls(bench)))


def _launched(bench: Bench, calls: list[Launch]) -> Iterator[_Candidate]:
    with launching.compiling():
        for make in calls:
            make()
    for make in calls:
        launched: list[list[tuple[Any, ...]]] = [[]]
        with launching.launches_told_to(lambda *launch: launched[-1].append(launch)):  # noqa: B023
            make()
            first = launched[-1]
            size = max(work.triton_kernel(*launch).bytes for launch in first)
            for _ in range(bench.copies(size) - 1):
                launched.append([])
                make()
        for index, launch in enumerate(first):
            yield _Candidate(
                work.triton_kernel(*launch), [partial(launching.launch_again, *each[index]) for each in launched]
            )


ADAPTED = (576, 576), (1024, 512), (1024, 1024), (2048, 512), (2048, 2048), (8192, 2048), (2048, 8192)
"""What an adapter's layer takes and gives."""


def our_calls(bench: Bench) -> Iterator[Launch]:
    """Calls of everything that launches kernels of this project, over the sizes that they are timed at."""
    seed = torch.zeros((), dtype=torch.int64, device=bench.device)
    for tokens, p in every((512, 2048, 4096, 16_384), (0.0, 0.1)):
        for width, out in ADAPTED:
            for rank in (8, 64) if tokens == 2048 else (8,):
                yield partial(_adapter, bench, (tokens, width, out, rank), p, seed)
        for width in (1024, 2048, 4096):
            yield partial(_sum, bench, tokens, width, p, seed)
    for tokens, width in every((512, 2048, 4096, 16_384), (576, 1024, 2048, 4096)):
        yield partial(_norm, bench, tokens, width)
    for tokens, width in every((2**14, 2**16, 2**18), (64, 128, 256)):
        yield partial(_norm, bench, tokens, width)
    for tokens, width in every((512, 2048, 4096, 16_384), (1536, 4096, 8192)):
        yield partial(_activations, bench, tokens, width)
    for rows, heads in every((1, 2, 8), ((16, 8, 128), (32, 8, 64), (9, 3, 64), (4, 1, 256))):
        yield partial(_rotary, bench, rows, heads)
    for width, out in ADAPTED:
        yield partial(_beside, bench, width, out)
    for tokens, vocabulary in ((664, 50_304), (256, 131_072), (128, 262_144), (2048, 32_768), (64, 131_072)):
        yield partial(_cross_entropy, bench, tokens, vocabulary)


def _cross_entropy(bench: Bench, tokens: int, vocabulary: int) -> None:
    targets, scales = (torch.ones(tokens, dtype=of, device=bench.device) for of in (torch.long, torch.float32))
    ours.cross_entropy_(bench.tensor(tokens, vocabulary), vocabulary, targets, scales)


def _adapter(bench: Bench, sizes: tuple[int, int, int, int], p: float, seed: Tensor) -> None:
    tokens, width, out, rank = sizes
    x, a, b = bench.tensor(tokens, width), bench.tensor(rank, width), bench.tensor(out, rank)
    inner = ours.add_adapter_(bench.tensor(tokens, out), x, a, b, 1e-3, p, seed, 0)
    ours.adapter_backward(bench.tensor(tokens, out), inner, x, a, b, bench.tensor(tokens, width), 1e-3, p, seed, 0)


def _norm(bench: Bench, tokens: int, width: int) -> None:
    x, norm = bench.tensor(tokens, width), Norm(bench.tensor(width), None, 1e-6, False)
    _, statistics = ours.norm(x, norm)
    ours.norm_backward(bench.tensor(tokens, width), x, norm, statistics)


def _sum(bench: Bench, tokens: int, width: int, p: float, seed: Tensor) -> None:
    """As blocks end: with a layer norm after the sum, with an RMS norm, and with another one before it."""
    branch, residual, weight = bench.tensor(tokens, width), bench.tensor(tokens, width), bench.tensor(width)
    layer, rms = Norm(weight, weight, 1e-6, True), Norm(weight, None, 1e-6, False)
    made = Sum(layer, p=p)
    ours.add_norm_backward([branch, residual], None, None, ours.add_norm(branch, residual, made, seed), made, seed)
    for made in (Sum(rms, p=p), Sum(rms, after=rms, p=p)):
        summed = ours.add_norm(branch, residual, made, seed)
        ours.add_norm_backward([residual], bench.tensor(tokens, width), branch, summed, made, seed)


def _activations(bench: Bench, tokens: int, width: int) -> None:
    x, up, grad = (bench.tensor(tokens, width) for _ in range(3))
    ours.gate(x, up, "silu")
    ours.gate_backward(grad, x, up, "silu")
    ours.gate_project_backward(grad, Reached(bench.tensor(tokens, 8), bench.tensor(8, width), 1e-3), x, up, "silu")
    _, positive = ours.relu(x)
    ours.relu_backward(grad, positive)


def _rotary(bench: Bench, rows: int, sizes: tuple[int, int, int]) -> None:
    """Heads of queries and keys turned, in place and, where they are normed, to others."""
    heads, key_heads, width = sizes

    def pair() -> tuple[Tensor, Tensor]:
        query, key = (bench.tensor(rows, 1024, count, width).transpose(1, 2) for count in (heads, key_heads))
        return query, key

    turns = Turns(bench.tensor(1, 1024, width), bench.tensor(1, 1024, width), neighbours=False, repeated=True)
    norm = Norm(bench.tensor(width), None, 1e-6, False)
    given, kept, grads = pair(), pair(), pair()
    rotary.rotate(given, given, turns, None)
    rotary.rotate_backward(grads, given, pair(), turns, None, None, turned=False)
    factors = rotary.rotate(given, kept, turns, (norm, norm))
    rotary.rotate_backward(grads, given, pair(), turns, (norm, norm), factors, turned=False)


def _beside(bench: Bench, width: int, out: int) -> None:
    """Factors placed beside a weight, and a weight of 4 bits made whole with them."""
    adapter = bench.tensor(16, width), bench.tensor(out, 16)
    layer: Any = torch.nn.Linear(width, out, bias=False, device=bench.device, dtype=torch.bfloat16)
    whole = joined.whole_of([layer], [adapter], 1.0)
    assert whole is not None
    placing = joined.Placing()
    placing.add(whole)
    placing.place()
    blocks = width * out // 64
    codes, scales = torch.zeros(256, device=bench.device), torch.zeros(-(-blocks // 256), device=bench.device)
    of_blocks = SimpleNamespace(absmax=scales, code=codes, blocksize=256)
    packed, absmax = (
        torch.zeros(count, dtype=torch.uint8, device=bench.device) for count in (width * out // 2, blocks)
    )
    state = SimpleNamespace(
        absmax=absmax, code=codes[:16], blocksize=64, nested=True, state2=of_blocks, offset=codes[0]
    )  # fmt: skip
    layer = SimpleNamespace(
        weight=SimpleNamespace(data=packed, quant_state=state), out_features=out, in_features=width
    )  # fmt: skip
    matrix = torch.empty(out + 16, width + 16, dtype=torch.bfloat16, device=bench.device)
    joined.unpack(layer, adapter, 1.0, matrix, (0, 0), (out, 16))


def attention_calls(bench: Bench) -> Iterator[Launch]:
    """As `our_calls`, of attention: heads that have keys of their own, and two, three and four that share them."""
    lengths = (16, 128), (8, 256), (1, 512), (4, 512), (8, 1024), (1, 2048), (2, 2048), (1, 8192)
    heads = (16, 16, 64), (9, 3, 64), (32, 8, 64), (8, 8, 128), (16, 8, 128)
    for (rows, length), sizes in every(lengths, heads):
        yield partial(_attend, bench, rows, length, sizes)


def _attend(bench: Bench, rows: int, length: int, sizes: tuple[int, int, int]) -> None:
    heads, key_heads, width = sizes
    query, key, value = (
        bench.tensor(rows * length, count, width).requires_grad_() for count in (heads, key_heads, key_heads)
    )
    attended = hopper.attend(query, key, value, hopper.Sees(None, length, None, width**-0.5))
    attended.backward(bench.tensor(rows * length, heads, width))


PARTS: dict[str, Callable[[Bench], Iterator[_Candidate]]] = {
    "passes": _passes,
    "our kernels": _ours,
    "our attention": _our_attention,
    "attention": _attentions,
    "products": _products,
}
