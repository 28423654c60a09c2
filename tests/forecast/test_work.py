"""What a step has the device do: kernels, their sizes and arithmetic, against what is counted by hand."""

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from conftest import MICRO
from lightweight.captured import hopper, kernels, launching, rotary
from lightweight.corpus import Corpus
from lightweight.forecast import tracer, work
from lightweight.forecast.work import Kernel, Watch, Work
from lightweight.internals.torch import DispatchMode
from lightweight.methods import BASELINE, LORA, LORA_CAPTURED, CapturedStep
from lightweight.targets import HOPPER, NATIVE
from lightweight.trial import Trial


class Watching(DispatchMode):
    """Shows a watch every operator."""

    def __init__(self):
        super().__init__()
        self.watch = Watch()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        result = operator(*arguments, **options or {})
        self.watch.see(operator, arguments, options or {}, result)
        return result


def seen(run) -> dict[Kernel, int]:
    with Watching() as mode:
        run()
    return dict(mode.watch.work().kernels)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_product_is_known_by_its_sizes_and_how_its_factors_lie():
    x, weight = meta(6, 4), meta(5, 4)
    assert seen(lambda: x @ weight.t()) == {
        Kernel("product nt", "bfloat16", (6, 5, 4), 2 * 6 * 5 * 4, 2 * (6 * 4 + 5 * 4 + 6 * 5)): 1
    }
    (added,) = seen(lambda: meta(6, 5).addmm_(x, weight.t()))
    assert (added.kind, added.bytes) == ("product nt, added", 2 * (6 * 4 + 5 * 4 + 2 * 6 * 5)), (
        "what it adds to is read"
    )
    (biased,) = seen(lambda: functional.linear(x, weight, meta(5)))
    assert biased.kind == "product nt"
    (batched,) = seen(lambda: torch.bmm(meta(3, 6, 4), meta(3, 4, 5)))
    assert (batched.kind, batched.shape, batched.flop) == ("product nn", (18, 5, 4), 2 * 3 * 6 * 5 * 4)
    assert seen(lambda: x[:0] @ weight.t()) == {}, "nothing is launched for nothing"


def flash(query, ends, window, name="forward"):
    operator = getattr(torch.ops.aten, f"_flash_attention_{name}").default
    arguments = [query, query, query, ends, ends, 64, 64, 0.0, True, False]
    if name == "backward":
        arguments = [query, *arguments[:3], query, query, *arguments[3:9], query, query]
    (kernel,) = work.kernels_of(operator, arguments, {"window_size_left": window}, None)
    return kernel


def test_attention_of_sequences_one_behind_the_other_is_that_of_rows_of_their_mean_length():
    rows, joined = meta(4, 64, 2, 8), meta(256, 2, 8)
    whole = flash(rows, None, None)
    assert whole.kind == "flash attention, causal" and whole.shape == (8, 64, 64, 8)
    assert whole.flop == 4 * 8 * 64 * 64 * 8 // 2
    assert flash(joined, meta(5, dtype=torch.int32), -1) == whole
    backward = flash(rows, None, None, "backward")
    assert (backward.kind, backward.flop) == ("flash attention backward, causal", whole.flop * 2.5)


def test_a_window_leaves_fewer_pairs():
    pairs = sum(min(place + 1, 16) for place in range(64))
    assert flash(meta(4, 64, 2, 8), None, 15).flop == pytest.approx(4 * 8 * 8 * pairs, rel=0.02)


@pytest.mark.parametrize(
    ("run", "kind", "count"),
    [
        (lambda: meta(8, 4) * meta(8, 4), "elementwise", 3 * 64),
        (lambda: meta(8, 4).mul_(meta(8, 4)), "elementwise", 3 * 64),
        (lambda: meta(8, 4) * meta(4), "strided", 64 + 8 + 64),
        (lambda: meta(4, 8).t() * meta(8, 4), "strided", 3 * 64),
        (lambda: meta(4, 8).t() * meta(4, 8).t(), "elementwise", 3 * 64),
        (lambda: meta(8, 1).expand(8, 4) + 1, "strided", 16 + 64),
        (lambda: torch.cat([meta(8, 4), meta(8, 4)]), "concatenation", 4 * 64),
        (lambda: meta(8, 4).sum(-1), "reduction of rows", 64 + 16),
        (lambda: meta(8, 4).sum(0), "reduction of columns", 64 + 8),
        (lambda: meta(8, 4).softmax(-1), "row by row", 2 * 64),
        (lambda: meta(8, 4).copy_(meta(8, 4)), "elementwise", 2 * 64),
        (lambda: meta(8, 4).zero_(), "elementwise", 64),
        (lambda: torch.mul(meta(8, 4), meta(8, 4), out=meta(8, 4)), "elementwise", 3 * 64),
        (lambda: functional.embedding(meta(3, dtype=torch.long), meta(100, 4)), "elementwise", 2 * 24),
    ],
)
def test_other_operators_are_passes_over_what_they_read_and_write(run, kind, count):
    assert seen(run) == {Kernel(kind, "", (count,), 0, count): 1}


def test_attention_moves_its_factors_and_its_result_and_backward_as_much_again():
    sizes, how = (6, 5, 7, 8), {"causal": False, "masked": False}
    forward, backward = (work.attention("flash", "bfloat16", sizes, backward=b, **how) for b in (False, True))
    assert forward.bytes == 2 * 6 * 8 * (5 + 7 + 7 + 5) and backward.bytes == 2 * forward.bytes
    assert work.attention("flash", "float32", sizes, backward=False, **how).bytes == 2 * forward.bytes


def test_four_bits_are_read_and_what_they_stand_for_is_written():
    packed, x, weight = meta(64, dtype=torch.uint8), meta(6, 8), meta(16, 8)
    unpacked = work.a_pass("dequantization", 64 + 2 * 128)
    operators = torch.ops.bitsandbytes
    assert list(work.kernels_of(operators.dequantize_4bit.default, (packed,), {}, weight)) == [unpacked]
    found = list(work.kernels_of(operators.gemm_4bit.default, (x, packed, [16, 8]), {}, None))
    assert found == [unpacked, work.product("nt", "bfloat16", 6, 16, 8, 2)]
    rows, weight = meta(2, 3, 8, dtype=torch.int8), meta(16, 8, dtype=torch.int8)
    found = list(work.kernels_of(operators.int8_linear_matmul.default, (rows, weight), {}, None))
    assert found == [work.product("nt", "int8", 6, 16, 8, 1)]


def test_the_gradient_of_a_part_is_zeros_with_the_part_copied_into_them():
    found = seen(lambda: torch.ops.aten.slice_backward(meta(3), [8], 0, 0, 3, 1))
    assert found == {work.a_pass("elementwise", 2 * 8): 1, work.a_pass("elementwise", 2 * 2 * 3): 1}


VIEWS = (
    *(lambda: meta(8, 4).t(), lambda: meta(8, 4)[2:], lambda: torch.ops.aten._unsafe_view(meta(8, 4), [4, 8])),
    lambda: torch.empty_like(meta(8, 4)),
)


@pytest.mark.parametrize("run", VIEWS)
def test_views_and_memory_alone_run_nothing(run):
    assert seen(run) == {}


def test_lists_of_tensors_take_as_few_kernels_as_on_a_gpu():
    tensors = [meta(1000, dtype=torch.float32) for _ in range(100)]
    ((kernel, launches),) = seen(lambda: torch._foreach_mul_(tensors, 2.0)).items()
    assert (launches, kernel.bytes) == (1, 2 * 100 * 4000)
    others, thirds, fourths = ([meta(1000, dtype=torch.float32) for _ in range(100)] for _ in range(3))
    ((kernel, launches),) = seen(lambda: torch._foreach_mul_(tensors, others)).items()
    assert (launches, kernel.bytes) == (2, 3 * 100 * 4000 // 2), "a kernel on two lists has 64 tensors"
    assert sum(seen(lambda: torch._foreach_addcmul_(tensors, others, thirds)).values()) == 3, "and on three 48"
    steps = [meta(dtype=torch.float32) for _ in range(100)]
    options = {"lr": 1.0, "beta1": 0.0, "beta2": 0.0, "weight_decay": 0.0, "eps": 1.0, "amsgrad": False}
    adamw = functools.partial(torch._fused_adamw_, tensors, others, thirds, fourths, [], steps, maximize=False)
    assert sum(seen(lambda: adamw(**options)).values()) == 3, "and on four 36, beside their steps"
    large = [meta(65_536 * 640, dtype=torch.float32)]
    assert list(seen(lambda: torch._foreach_mul_(large, 2.0)).values()) == [2], "a kernel has 320 chunks"


def test_everything_is_seen_as_often_as_the_watch_says():
    factor, logits = meta(2, 2), meta(4, 4)
    with Watching() as mode:
        mode.watch.times = 3
        factor @ factor
        mode.watch.launched("cross_entropy", (4,), (logits,), {})
        mode.watch.times = 1
        factor @ factor
    found = mode.watch.work()
    assert {kernel.kind: times for kernel, times in found.kernels.items()} == {"product nn": 4, "cross_entropy": 3}
    assert (found.launches, found.operators) == (7, 7)


def test_a_kernel_of_ours_passes_once_over_each_tensor_and_again_where_it_adds():
    y, x, a, b, inner, seed = meta(64, 32), meta(64, 16), meta(8, 16), meta(32, 8), meta(64, 8), meta(dtype=torch.long)
    once = 2 * (64 * 16 + 8 * 16 + 32 * 8 + 64 * 8) + 8
    arguments = (y, x, a, b, inner, seed, 0, 0, 1.0)
    kernel = work.triton_kernel("add_adapter", (4,), arguments, {"drops": True})
    assert kernel == Kernel("add_adapter with dropout", "bfloat16", (once + 2 * 2 * 64 * 32, 4), 0, once + 8192)
    assert work.triton_kernel("add_adapter", (4,), arguments, {"drops": False}).kind == "add_adapter"


def told(run) -> list[Kernel]:
    """The kernels of ours that are launched."""
    found: list[Kernel] = []
    with (
        launching.shapes_alone(),
        launching.launches_told_to(lambda *launch: found.append(work.triton_kernel(*launch))),
    ):
        run()
    return found


HALF, LONG, FLOAT = 2, 8, 4
X, GRAD_X = meta(64, 16), meta(64, 16)
REACHED, A, B, OUT = meta(64, 8), meta(8, 16), meta(32, 8), meta(64, 32)
ONCE = HALF * (64 * 8 + 64 * 16 + 8 * 16)  # what is reached, x and a
SHARE_OF_A, SHARES = HALF * 8 * 16, HALF * (8 * 16 + 32 * 8)  # of 64 rows
SEED = meta(dtype=torch.long)


@pytest.mark.parametrize("adds", [True, False], ids=["the input has a gradient", "it has none"])
@pytest.mark.parametrize(
    ("run", "moved"),
    [
        (lambda grad_x: kernels.project_backward(REACHED, X, A, grad_x, 1.0), ONCE + SHARE_OF_A),
        (
            lambda grad_x: kernels.adapter_backward(OUT, REACHED, X, A, B, grad_x, 1.0, 0.0, SEED, 0),
            ONCE + HALF * (64 * 32 + 32 * 8) + kernels._over(64, kernels.NARROW_TILE["rows"]) * SHARES + LONG,
        ),
    ],
    ids=["project", "adapter"],
)
def test_a_backward_kernel_of_an_adapter_reads_and_writes_the_gradient_that_it_adds_to(run, moved, adds):
    (kernel,) = told(lambda: run(GRAD_X if adds else None))
    assert kernel.bytes == moved + 2 * HALF * 64 * 16 * adds


def test_cross_entropy_reads_logits_twice_and_writes_their_gradient():
    of_tokens = meta(6, dtype=torch.long), meta(6, dtype=torch.float32)
    (kernel,) = told(lambda: kernels.cross_entropy_(meta(6, 40), 40, *of_tokens))
    assert kernel.bytes == 3 * HALF * 6 * 40 + 6 * (LONG + FLOAT + FLOAT)


def test_a_program_of_the_gradient_of_keys_has_the_queries_of_all_heads_of_a_group():
    """Two rows of 16 tokens, with six heads of queries and two of keys."""

    def run():
        query, key, value = (meta(32, heads, 64).requires_grad_() for heads in (6, 2, 2))
        attended = hopper.attend(query, key, value, hopper.Sees(None, 16, None, 1.0))
        attended.backward(torch.empty_like(attended))

    forward, of_queries, of_keys = told(run)
    assert forward.shape == of_queries.shape == (2 * 6, 16, 16, 64)
    assert of_keys.shape == (2 * 2, 3 * 16, 16, 64)
    assert of_queries.flop + of_keys.flop == pytest.approx(work.BACKWARD * forward.flop, rel=1e-3)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_rotation_reads_and_writes_queries_and_keys_in_place_or_not(in_place):
    given, others = ((meta(2, 4, 8, 16), meta(2, 1, 8, 16)) for _ in range(2))
    turns = rotary.Turns(meta(1, 8, 16), meta(1, 8, 16), neighbours=False, repeated=True)
    (kernel,) = told(lambda: rotary.rotate(given, given if in_place else others, turns, None))
    assert kernel.bytes == HALF * (2 * 2 * 5 * 8 * 16 + 2 * 8 * 16)


def trial(method, **changes):
    corpus = Corpus(train=(), heldout=(), digest="")
    return Trial(model=MICRO, method=method, target=NATIVE, corpus=corpus, max_length=16, **changes)


HIDDEN, INNER, VOCABULARY, TOKENS, LENGTH = 32, 64, 384, 8 * 16, 16
WEIGHTS = 4 * HIDDEN**2 + 2 * HIDDEN * INNER + VOCABULARY * HIDDEN
SCORES = 4 * 8 * 2 * LENGTH**2 * (HIDDEN // 2)


def kinds_of(found: Work) -> Counter[str]:
    """How often kernels of each kind are launched."""
    return Counter(kernel.kind for kernel in Counter(found.kernels).elements())


def products(found: Work) -> int:
    return sum(kernel.flop * n for kernel, n in found.kernels.items() if kernel.kind.startswith("product"))


def test_a_stock_step_does_six_operations_a_weight_and_token():
    found = tracer.trace(trial(BASELINE), HOPPER).work
    assert products(found) == 6 * WEIGHTS * TOKENS
    attention = {kernel.kind: n for kernel, n in found.kernels.items() if "attention" in kernel.kind}
    assert sorted(attention) == ["efficient attention backward, masked", "efficient attention, masked"]
    assert found.flop == products(found) + SCORES * 3.5


def test_passes_that_accumulate_are_counted_each_and_the_optimizer_once():
    one, four = (tracer.trace(trial(method), HOPPER).work for method in (BASELINE, BASELINE.with_passes(4)))
    assert products(four) == products(one)
    product, step = work.product("nt", "float32", 2, 2, 2, 4), work.a_pass("elementwise", 8)
    both = work.added((Work({product: 3}, 5), 4), (Work({step: 1, product: 1}, 2), 1))
    assert both == Work({product: 13, step: 1}, 22)


def test_a_captured_step_of_an_adapter_does_four_operations_for_a_frozen_weight():
    method = LORA_CAPTURED.with_batch(8)
    found = tracer.trace(trial(method), HOPPER).work
    # Adapters of so narrow layers are kernels of ours, and the first layer's input needs no gradient: three products
    # there have no backward pass.
    assert products(found) == 4 * WEIGHTS * TOKENS - 2 * 3 * HIDDEN**2 * TOKENS
    kinds = {kernel.kind for kernel in found.kernels}
    assert {"add_adapter with dropout", "adapter_backward with dropout", "cross_entropy"} <= kinds
    assert {"flash attention, causal", "flash attention backward, causal"} <= kinds
    assert found.format in ("bfloat16", "float16")


def test_gradients_are_clipped_in_a_few_kernels_as_on_a_gpu():
    """All norms are one kernel on a list, and theirs is a reduction; one by one, the norm of each of the adapters' four
    gradients would be one, too."""

    def reductions(method, **changes):
        method = replace(method, training_arguments={**method.training_arguments, **changes})
        return kinds_of(tracer.trace(trial(method), HOPPER).work)["reduction of rows"]

    assert reductions(LORA) == 1
    assert reductions(LORA_CAPTURED) - reductions(LORA_CAPTURED, max_grad_norm=0.0) == 1


def test_what_runs_without_a_graph_is_counted_too():
    eager = LORA_CAPTURED.with_batch(8)
    without = type(eager)(**{**vars(eager), "step": CapturedStep(graph=False)})
    graph, plain = (tracer.trace(trial(method), HOPPER).work for method in (eager, without))
    assert products(graph) == products(plain)
