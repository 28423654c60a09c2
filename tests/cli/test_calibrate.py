"""`lightweight calibrate`: what it times is what forecasts ask for; the timing itself needs a card."""

import ast
from pathlib import Path

import pytest
import torch

from lightweight import targets
from lightweight.captured import kernels, launching
from lightweight.cli import calibrate
from lightweight.forecast import calibration, work
from tests.forecast.test_work import seen

RATES = targets.RATES["H100 80GB HBM3"]


def kernels_of_ours() -> set[str]:
    functions = [
        node
        for source in Path(kernels.__file__).parent.glob("triton_*.py")
        for node in ast.parse(source.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    ]
    return {function.name for function in functions if not function.name.startswith("_")}


def test_every_kernel_of_ours_is_timed_with_dropout_where_it_has_it():
    names: set[str] = set()
    told: set[str] = set()

    def tell(name, *launch):
        names.add(name)
        told.add(work.triton_kernel(name, *launch).kind)

    bench = calibrate.Bench(RATES, "meta")
    with launching.shapes_alone(), launching.launches_told_to(tell):
        for call in (*calibrate.our_calls(bench), *calibrate.attention_calls(bench)):
            call()
    assert names == kernels_of_ours()
    assert told >= {"add_adapter with dropout", "project with dropout", "rotate with a norm", "add_norm with a norm"}


def test_our_attention_is_timed_by_what_a_forecast_asks_for():
    told: list[work.Kernel] = []
    with (
        launching.shapes_alone(),
        launching.launches_told_to(lambda *launch: told.append(work.triton_kernel(*launch))),
    ):
        for call in calibrate.attention_calls(calibrate.Bench(RATES, "meta")):
            call()
    assert {kernel.kind for kernel in told} == {
        "our attention, causal",
        "our attention backward of queries, causal",
        "our attention backward of keys, causal",
    }
    of_one = [kernel for kernel in told if kernel.shape in ((32, 2048, 2048, 128), (16, 4096, 2048, 128))]
    forward, *backward = (kernel.flop for kernel in of_one)
    assert forward == 4 * 32 * 2048 * 2048 * 128 / 2 and sum(backward) == pytest.approx(work.BACKWARD * forward)


@pytest.mark.parametrize("kind", calibrate.PASSES)
def test_a_pass_that_is_timed_is_of_its_kind_and_moves_its_bytes(kind):
    bench = calibrate.Bench(RATES, "cpu", pool_bytes=2**26)
    size = 2**21
    ((kernel, launches),) = seen(calibrate.PASSES[kind](bench, size // 2)).items()
    assert (kernel.kind, launches) == (kind, 1)
    assert kernel.bytes == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
@pytest.mark.parametrize("is_added", [False, True])
def test_a_product_that_is_timed_is_what_it_says(layout, is_added):
    bench = calibrate.Bench(RATES, "cpu", pool_bytes=2**22)
    candidate = calibrate._product(bench, "bfloat16", layout, (32, 48, 64), is_added=is_added)
    assert seen(candidate.launches[0]) == {candidate.kernel: 1}
    assert len(candidate.launches) == 16, "each on memory of its own"


def test_the_sizes_are_those_that_forecasts_ask_for():
    sizes = calibrate.product_sizes()
    assert len(set(sizes)) == len(sizes)
    assert {(4096, 16, 1024), (16, 1024, 4096), (256, 131_072, 1024), (256, 1024, 131_072)} <= set(sizes)
    assert {(8, 2048, 256), (32, 2048, 128), (128, 256, 64)} <= set(calibrate.ATTENTION)
    between = calibrate.sizes_between()
    assert set(between) <= set(sizes) and between == calibrate.sizes_between()
    assert all(size % 64 == 0 and 256 <= size <= 8192 for shape in between for size in shape)
    assert len({size for shape in between for size in shape}) > 60


@pytest.mark.needs_cuda
def test_a_card_is_timed(monkeypatch):
    monkeypatch.setattr(calibrate, "SIZES", [2**20, 2**24])
    monkeypatch.setattr(calibrate, "PARTS", {"passes": calibrate._passes})
    monkeypatch.setattr(calibrate.stock_pace, "operator_seconds", lambda: {"lora": 1e-5})
    found = calibrate.run()
    assert {sample.kind for sample in found.samples} == {*calibrate.PASSES, "dequantization"}
    large = next(one for one in found.samples if one.kind == "elementwise" and one.shape == (2**24,))
    assert 1 < large.seconds / calibration.limit(large.kernel, found.rates) < 20
    assert torch.cuda.get_device_name() == found.device
