import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from lightweight.child import host_memory
from lightweight.internals import torch as torch_internals
from lightweight.internals.torch import FakeTensor, FakeTensorMode, no_dispatch

aten = torch.ops.aten


def test_a_storage_is_told_from_another_by_its_address():
    first, second = torch.zeros(2), torch.zeros(2)
    addresses = {torch_internals.address(tensor.untyped_storage()) for tensor in (first, first[1:], second)}
    assert len(addresses) == 2


def test_a_process_that_may_use_cuda_is_told_so():
    assert torch_internals.is_fork_without_cuda() is False


def test_cublas_is_asked_by_the_name_that_torchs_own_graphs_ask_it_by():
    """A build without CUDA has the name in its source alone."""
    spec = find_spec("torch._inductor.cudagraph_trees")
    assert spec is not None and spec.origin is not None
    assert "torch._C._cuda_clearCublasWorkspaces()" in Path(spec.origin).read_text("utf-8")
    torch_internals.free_workspaces()


def test_a_layer_that_failed_leaves_no_hook_to_the_passes_after_it():
    """As torch 2.11 checkpoints a layer: what suspends the hook lives in the frame of the one that failed."""

    def checkpointed():
        generator = torch.utils.checkpoint._checkpoint_without_reentrant_generator(fail)
        next(generator)
        fail()

    def fail():
        raise RuntimeError("in a layer")

    with pytest.raises(RuntimeError, match="in a layer") as kept, torch_internals.no_hooks_left():
        checkpointed()
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()
    assert kept.value.__traceback__ is not None
    assert x.grad is not None and torch.equal(x.grad, torch.full((2,), 2.0))


def test_a_schema_says_what_an_operator_takes_and_whether_it_writes():
    schema = torch_internals.schema(aten.add_.Tensor)
    assert schema.is_mutable and [argument.name for argument in schema.arguments] == ["self", "other", "alpha"]
    view = torch_internals.schema(torch_internals.VIEW_THAT_SAYS_IT_IS_NONE)
    assert not any(value.alias_info for value in view.returns)


def test_tensors_are_copied_and_added_each_to_its_own():
    targets = [torch.zeros(2), torch.zeros(3)]
    torch_internals.copy_each_(targets, [torch.ones(2), torch.full((3,), 2.0)])
    torch_internals.add_each_(targets, targets)
    assert [target.tolist() for target in targets] == [[2.0] * 2, [4.0] * 3]


def test_hooks_around_an_optimizers_steps_are_seen():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # which wraps the step and hooks nothing
    assert not torch_internals.has_step_hooks(optimizer)
    hook = optimizer.register_step_post_hook(lambda *_: None)
    assert torch_internals.has_step_hooks(optimizer)
    hook.remove()
    optimizer.register_step_pre_hook(lambda *_: None)
    assert torch_internals.has_step_hooks(optimizer)


def test_a_scaler_that_finds_all_finite_takes_every_step():
    """One that asks would skip this one."""
    weights = {}
    for kind in (torch.amp.GradScaler, torch_internals.FindingAllFinite):
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer, scaler = torch.optim.SGD([weight], lr=1.0), kind("cpu")
        scaler.scale(weight.sum()).backward()
        assert weight.grad is not None
        weight.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        weights[kind] = weight.detach().tolist()
    assert list(weights.values()) == [[0.0, 0.0], [-torch.inf, -1.0]]


def test_a_pinned_network_stays_where_it_is():
    network = torch.nn.Linear(2, 2)
    torch_internals.pin(network)
    assert network.to("meta") is network and network.weight.device.type == "cpu"


@pytest.mark.parametrize("kernel", ["cudnn_attention", "flash_attention", "efficient_attention", "math_attention"])
def test_every_kernel_of_attention_is_called_as_the_rules_call_it(kernel):
    query = {"cudnn_attention": (None, True), "efficient_attention": (None, True), "math_attention": (None,)}
    with FakeTensorMode():
        heads = torch.empty(1, 2, 8, 16, device="meta")
        output = getattr(torch_internals, kernel)(heads, heads, heads, *query.get(kernel, ()), 0.0, True, scale=1.0)[0]
    assert output.shape == heads.shape


@pytest.mark.parametrize(("shape", "ends"), [((12, 4, 16), True), ((2, 6, 4, 16), False)])
@pytest.mark.parametrize("window", [None, 3])
def test_flash_attention_is_called_as_its_operators_want_it_forward_and_backward(shape, ends, window):
    seen = []

    class Mode(torch_internals.DispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            seen.append(operator)
            return operator(*arguments, **options or {})

    with FakeTensorMode(), Mode():
        query = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(*shape[:-2], 2, 16, dtype=torch.bfloat16, requires_grad=True)
        own = torch.tensor([0, 6, 12, 12], dtype=torch.int32) if ends else None
        output = torch_internals.flash_attention_forward(query, key, key, own, 6, window=window, dropout=0.1, scale=1.0)
        assert output.shape == shape
        output.sum().backward()
    assert {torch_internals.FLASH_FORWARD, torch_internals.FLASH_BACKWARD} <= {*seen}
    assert query.grad is not None and key.grad is not None
    assert query.grad.shape == shape and key.grad.shape == key.shape


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_a_kernel_of_attention_runs_there_and_back_as_it_is_timed(name):
    with FakeTensorMode():
        query, key, value = (torch.empty(2, 2, 8, 16, dtype=torch.bfloat16, device="meta") for _ in range(3))
        forward, backward = torch_internals.attention_kernel(name, (query, key, value), None)
        (output, *_), (*gradients,) = cast(Any, forward()), cast(Any, backward())
    assert [tensor.shape for tensor in (output, *gradients[:3])] == [query.shape] * 4


def test_softmax_says_whether_it_writes_fp32():
    with FakeTensorMode():
        half = torch.empty(2, 3, dtype=torch.float16, device="meta")
        for softmax in (torch_internals.softmax, torch_internals.log_softmax):
            assert softmax(half, 1, True).dtype == torch.float32


def test_the_gradient_of_a_softmax_takes_the_gradient_and_the_shares():
    names = [argument.name for argument in torch_internals.schema(torch_internals.SOFTMAX_BACKWARD).arguments]
    assert names[:2] == ["grad_output", "output"]


def test_autocast_registers_products_for_cuda_and_cpu():
    assert "linear" in torch_internals.registered("AutocastCUDA") & torch_internals.registered("AutocastCPU")


def test_a_kernel_of_autocast_goes_on_without_it():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with torch_internals.without_autocast_of_cpu():
            assert (x @ x).dtype == torch.float32


@pytest.mark.filterwarnings(r"ignore:[\s\S]*overrid:UserWarning")
def test_what_a_library_registered_is_taken_back():
    library = torch.library.Library("aten", "IMPL")
    library.impl("relu", lambda x: x + 100, "CPU")
    x = torch.ones(1)
    assert torch.relu(x).item() == 101
    torch_internals.unregister(library)
    assert torch.relu(x).item() == 1


def test_fake_tensors_say_where_they_are_and_a_constant_what_it_is():
    with FakeTensorMode() as mode:
        assert torch_internals.fake_device(torch.empty(2)) == torch.device("cpu")
        assert torch_internals.fake_constant(mode, 1.0).item() == 1.0
        assert torch_internals.has_content(cast("FakeTensor", torch.tensor(0.0)))
        assert not torch_internals.has_content(cast("FakeTensor", torch.empty(2)))
        with no_dispatch():
            assert type(torch.empty(2)) is torch.Tensor


def test_torch_asks_for_a_device_by_an_operator_that_a_mode_sees():
    seen = []

    class Mode(torch_internals.DispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            seen.append(operator)
            return operator(*arguments, **options or {})

    assert torch_internals.DispatchMode._should_skip_dynamo() is False
    assert hasattr(torch_internals.TorchDispatchMode, "_should_skip_dynamo")
    with FakeTensorMode(), Mode():
        torch.empty(2).to("cpu")
    assert torch_internals.DEVICE_OF in seen


def test_an_operator_that_cannot_be_traced_is_logged_where_it_is_said():
    assert sys.modules[FakeTensor.__module__].log.name == torch_internals.FAKE_TENSOR_LOGGER


@pytest.fixture
def mesh():
    """Of one rank of two, with nobody else there."""
    distributed.init_process_group("fake", store=torch_internals.fake_store(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()


def test_replicas_of_fake_tensors_send_weights_flat_and_add_gradients_up(mesh):
    """Two passes, after the first of which torch would make buckets anew."""
    seen: list[tuple[Any, Any]] = []

    class Mode(torch_internals.DispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            result = operator(*arguments, **options or {})
            seen.append((operator, result))
            return result

    def add_up(group, bucket):
        distributed.all_reduce(bucket.buffer())
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch_internals.fake_tensors_have_addresses(),
        torch_internals.replicas_of_fake_tensors(),
        Mode(),
    ):
        network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        assert (aten.cat.default, (4 * 4 + 4,)) in [(o, tuple(getattr(result, "shape", ()))) for o, result in seen]
        network.register_comm_hook(None, add_up)
        for _ in range(2):
            network(torch.ones(2, 4)).sum().backward()
        assert all(weight.grad is not None for weight in network.parameters())
    assert [operator for operator, _ in seen].count(torch_internals.ADDED_UP) == 2


def test_fsdp_shards_over_the_mesh_that_is_said_and_every_part_of_that_is_seen(mesh):
    """Weights are freed and restored by resizing, operators of its own write what is sent, and DTensor tries shapes."""
    resized, tried, written = [], [], []  # type: ignore[var-annotated]

    class Mode(torch_internals.DispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            written.extend(torch_internals.written_by_fsdp(operator, arguments, options or {}))
            return operator(*arguments, **options or {})

    @contextmanager
    def trying():
        tried.append(1)
        yield

    network = torch.nn.Linear(4, 4)
    with (
        torch_internals.sharded_over(mesh),
        torch_internals.storages_resized(resized.append),
        torch_internals.shapes_propagated_in(trying),
    ):
        fully_shard(network)
        assert network.weight.device_mesh is mesh  # type: ignore[attr-defined]
        with Mode():
            network(torch.ones(1, 4)).sum().backward()
        _ = network.weight + network.weight
    assert torch_internals.own_part(network.weight).shape == (2, 4)
    plain = torch.ones(1)
    assert torch_internals.own_part(plain) is plain
    assert resized and tried and written


def test_a_twin_has_other_children_and_the_forward_pass_of_its_class():
    module = torch.nn.Sequential(torch.nn.ReLU())
    module.forward = lambda x: x  # as accelerate and others wrap it
    twin = torch_internals.twin_of(module, {"0": torch.nn.Sigmoid()})
    assert twin(torch.zeros(1)) == 0.5
    assert module(torch.zeros(1)) == 0 and isinstance(module[0], torch.nn.ReLU)


def test_numbers_are_computed_with_inside_a_mode_of_fake_tensors():
    with FakeTensorMode():
        assert isinstance(torch.ones(2), FakeTensor)
        with torch_internals.with_numbers():
            assert torch.ones(2).sum().item() == 2


def test_a_number_that_the_host_reads_and_a_backward_pass_are_seen():
    seen = []

    class Mode(torch_internals.DispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            seen.append((operator, torch_internals.in_backward()))
            return operator(*arguments, **options or {})

    with Mode():
        x = torch.ones(2, requires_grad=True)
        total = (x * x).sum()
        assert total.item() == 2
        total.backward()
    assert (torch_internals.READ_BY_THE_HOST, False) in seen
    assert (aten.mul.Tensor, False) in seen and (aten.mul.Tensor, True) in seen


def test_gradients_are_clipped_in_a_few_kernels_for_all():
    seen = []

    class Mode(torch_internals.DispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            seen.append(operator.name())
            return operator(*arguments, **options or {})

    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.ones(2)
    with FakeTensorMode(allow_non_fake_inputs=True), torch_internals.gradients_clipped_at_once(), Mode():
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
    assert {"aten::_foreach_norm.Scalar", "aten::_foreach_mul_.Tensor"} <= {*seen}


def test_fake_tensors_are_told_apart_by_addresses():
    with FakeTensorMode(), torch_internals.fake_tensors_have_addresses():
        first, second = torch.empty(2), torch.empty(2)
        assert first.data_ptr() == first.view(2, 1).data_ptr() != second.data_ptr()
    assert "data_ptr" not in vars(FakeTensor)


def test_questions_about_gpus_are_answered_without_one_and_the_answers_forgotten():
    from torch._dynamo import device_interface

    gpu = SimpleNamespace(name="any", major=9, minor=0)
    own = torch.cuda.get_device_properties
    with torch_internals.answering_about_gpus(gpu):
        assert torch.cuda.get_device_properties(0) is gpu and torch.cuda.get_device_name() == "any"
        assert torch.cuda.get_device_capability() == (9, 0) and torch.cuda.current_device() == 0
        for name in torch_internals.DYNAMOS_MEMORY:
            getattr(device_interface, name)["cuda"] = gpu
    assert torch.cuda.get_device_properties is own
    assert not any(getattr(device_interface, name) for name in torch_internals.DYNAMOS_MEMORY)


def test_a_function_is_compiled_once_and_when_it_is_called(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(options) or (lambda x: -f(x)))
    with torch_internals.compiling_when_called():
        negated = torch.compile(lambda x: x + 1, dynamic=False)
    assert not compiled
    assert [negated(1), negated(2)] == [-2, -3]
    assert compiled == [{"dynamic": False}]


def test_every_dropout_lets_through():
    x = torch.ones(2, 4, 8)
    own = functional.dropout
    with torch_internals.without_dropout():
        for module, name in torch_internals.DROPOUTS:
            assert getattr(module, name)(x, 0.9, True) is x
        plain = functional.scaled_dot_product_attention(x, x, x)
        assert torch.equal(functional.scaled_dot_product_attention(x, x, x, dropout_p=0.9), plain)
    assert functional.dropout is own


def test_the_hooks_of_a_module_are_those_before_and_after_its_forward_pass():
    module, seen = torch.nn.Linear(1, 1), []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    for hook in torch_internals.forward_hooks(module):
        hook(module, None)
    assert seen == ["before", "after"]


def test_memory_that_cannot_be_pinned_is_the_hosts(monkeypatch):
    def none(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch, "empty", none)
    with pytest.raises(MemoryError, match=r"2,048 bytes cannot be pinned: CUDA error: out of memory$") as caught:
        torch_internals.pinned((4, 256), torch.bfloat16)
    assert host_memory.ran_out(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a GPU")
def test_a_tensor_on_the_host_is_one_of_the_gpus():
    whole = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    there = torch_internals.on_the_host(whole)
    assert torch.cuda.memory_allocated() == before
    assert there.is_cuda
    assert torch.equal(there, whole)
    ids = torch.tensor([[3, 60]], device="cuda")
    assert torch.equal(torch.nn.functional.embedding(ids, there), whole[ids])
