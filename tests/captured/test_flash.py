import contextlib
import functools
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from captured import flash_reference
from lightweight.captured import attention, dropout, flash
from lightweight.captured.flash import Reach, Sequences
from lightweight.captured.parts import PartError
from lightweight.internals import torch as torch_internals

CPU = torch.device("cpu")


def test_the_reference_is_what_torch_computes_from_a_mask():
    lengths, window, scale = [3, 9], 4, 0.7
    query, key, value, upstream = (torch.randn(12, heads, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
    dialogues = torch.tensor([[0] * 3 + [1] * 9])
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    first, second, third = (leaf.transpose(0, 1)[None] for leaf in leaves)
    expected = functional.scaled_dot_product_attention(
        first,
        second,
        third,
        attn_mask=Reach(window, dialogues).mask(12, CPU),
        enable_gqa=True,
        scale=scale,
    )[0].transpose(0, 1)
    expected.backward(upstream)
    assert torch.allclose(flash_reference.attention(query, key, value, lengths, window, scale), expected)
    found = flash_reference.gradients(upstream, query, key, value, lengths, window, scale)
    for own, leaf in zip(found, leaves, strict=True):
        assert leaf.grad is not None and torch.allclose(own, leaf.grad)


@pytest.mark.parametrize(
    ("capability", "dtype", "has"),
    [
        ((7, 5), torch.float16, False),  # a T4
        ((8, 0), torch.float16, True),
        ((8, 9), torch.bfloat16, True),
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
    ],
)
def test_cards_from_ampere_on_have_flash_kernels_for_halves(capability, dtype, has):
    with flash.as_on(capability):
        assert flash.has_kernels(CPU, dtype) is has
    assert not flash.has_kernels(CPU, dtype)


WIDE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen3": WIDE | {"head_dim": 16},
    "mistral": WIDE | {"sliding_window": 8},
    "gemma3_text": WIDE | {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 64,
        "attention_dropout": 0.0,
    },
    "opt": {
        "vocab_size": 64,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
}
WINDOWS = {"mistral": [7, 7], "gemma3_text": [7, -1], "gpt_neo": [-1, 7]}


def build(name):
    """A model in fp64, in which the reference's kernels are taken to compute: what is the same then is the same."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **CONFIGS[name])
    own = "eager" if name == "gpt_neo" else "sdpa"
    return AutoModelForCausalLM.from_config(config, attn_implementation=own, dtype=torch.float64).train()


@pytest.fixture
def asked(monkeypatch):
    """What flash kernels were asked for, of a model in fp64, on the CPU."""
    monkeypatch.setattr(flash, "HALVES", (torch.float64,))
    seen: list[tuple[Any, ...]] = []
    with flash_reference.on_a_cpu(seen):
        yield seen
    flash._met.clear()


@contextlib.contextmanager
def no_masks():
    """Nothing that makes a mask works inside."""
    with mock.patch.object(attention, "sdpa_mask", None), mock.patch.object(Reach, "mask", None):
        yield


def gradients(model, loss):
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_dialogues_joined_to_a_row_are_as_if_each_were_alone_and_no_mask_is_made(name, asked):
    model, reference = build(name), build(name)
    attention.install(model)
    dialogues = [torch.randint(64, (1, length)) for length in (13, 21, 1, 5)]
    row = torch.cat([*dialogues, torch.zeros(1, 8, dtype=torch.int64)], dim=1)
    lengths = [own.shape[1] for own in dialogues]
    positions = torch.cat([torch.arange(length) for length in (*lengths, 8)]).unsqueeze(0)
    numbers = torch.repeat_interleave(torch.tensor([3, 1, 0, 2, -1]), torch.tensor([*lengths, 8])).unsqueeze(0)
    ends = torch.tensor([0, *itertools.accumulate([*lengths, 8]), 48, 48], dtype=torch.int32)
    seen_as = torch.ones_like(row)
    seen_as[0, sum(lengths) :] = 0
    with no_masks(), attention.packed(numbers), attention.on_flash(Sequences(ends, 21)):
        inputs = {"input_ids": row, "attention_mask": seen_as, "position_ids": positions}
        output = model(**inputs, use_cache=False).logits[0, : sum(lengths)]
    weights = torch.randn(sum(lengths), 64, dtype=torch.float64)
    found = gradients(model, (output * weights).sum())
    alone = [
        reference(input_ids=own, attention_mask=torch.ones_like(own), use_cache=False).logits[0] for own in dialogues
    ]
    expected = gradients(reference, (torch.cat(alone) * weights).sum())
    assert torch.allclose(output, torch.cat(alone), atol=1e-5)  # norms and scores may be in fp32
    for parameter, gradient in expected.items():
        assert torch.allclose(found[parameter], gradient, atol=1e-5), parameter
    assert [window for *_, window in asked] == WINDOWS.get(name, [-1, -1])
    assert {(sequences, longest) for _, sequences, longest, _ in asked} == {((13, 21, 1, 5, 8, 0, 0), 21)}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("time", [8, 9, 30])
def test_rows_of_a_dialogue_each_run_without_a_mask_too(name, time, asked):
    model, reference = build(name), build(name)
    attention.install(model)
    ids = torch.randint(64, (3, time))
    with no_masks(), attention.on_flash(None):
        found = gradients(model, model(input_ids=ids, labels=ids, use_cache=False).loss)
    expected = gradients(reference, reference(input_ids=ids, labels=ids, use_cache=False).loss)
    for parameter, gradient in expected.items():
        assert torch.allclose(found[parameter], gradient, atol=1e-5), parameter
    windows = WINDOWS.get(name, [-1, -1]) if time > 8 else [-1, -1]
    assert [(shape[:2], sequences, window) for shape, sequences, _, window in asked] == [
        ((3, time), None, window) for window in windows
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_what_has_no_kernel_is_computed_from_the_same_reach_as_a_mask(name):
    """fp32, in the place of halves, is what a step is checked in."""
    model, reference = build(name), build(name)
    attention.install(model)
    first, second = torch.randint(64, (1, 13)), torch.randint(64, (1, 17))
    row = torch.cat([first, second], dim=1)
    inputs = {"input_ids": row, "position_ids": torch.cat([torch.arange(13), torch.arange(17)]).unsqueeze(0)}
    dialogues = torch.tensor([[4] * 13 + [2] * 17])
    sequences = Sequences(torch.tensor([0, 13, 30], dtype=torch.int32), 17)
    with attention.packed(dialogues), attention.on_flash(sequences):
        logits = model(**inputs, attention_mask=torch.ones_like(row), use_cache=False).logits
    for part, ids in ((logits[:, :13], first), (logits[:, 13:], second)):
        alone = reference(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        assert torch.allclose(part, alone, atol=1e-5)


def test_chunks_of_which_each_sees_itself_alone_are_no_window(asked):
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    options = {"batch_size": 1, "q_length": 20, "kv_length": 20, "local_size": 8, "device": CPU}
    chunked = chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int64))
    window = sliding_window_causal_mask_function(8)
    with attention.on_flash(None):
        assert attention._mask(mask_function=window, **options).window == 8  # type: ignore[union-attr]
        assert isinstance(attention._mask(mask_function=chunked, **options), torch.Tensor)
        wider = attention._mask(mask_function=sliding_window_causal_mask_function(9), **options)
        assert isinstance(wider, torch.Tensor), "what a mask does counts, not what size it says"


def test_a_window_that_also_looks_at_the_rows_is_a_mask(asked):
    from transformers.masking_utils import and_masks, sliding_window_causal_mask_function

    shown = torch.ones(2, 20, dtype=torch.bool)
    shown[1, 3] = False  # which the first row does not tell
    looks = and_masks(sliding_window_causal_mask_function(8), lambda row, head, query, key: shown[row, key])
    options = {"batch_size": 2, "q_length": 20, "kv_length": 20, "local_size": 8, "device": CPU}
    with attention.on_flash(None):
        mask = attention._mask(mask_function=looks, **options)
    assert isinstance(mask, torch.Tensor) and bool(mask[0, 0, 5, 3]) and not mask[1, 0, 5, 3]


def test_under_autocast_attention_is_in_the_half_that_it_casts_to():
    single = torch.randn(1, 2, 6, 16)
    with flash_reference.on_a_cpu():
        assert flash.attend(single, single, single, Reach(), 0.0, None) is None
        with torch.autocast("cpu", torch.bfloat16):
            output = flash.attend(single, single, single, Reach(), 0.0, None)
    assert output is not None and output.dtype == torch.bfloat16


def test_of_two_windows_the_shorter_is_seen():
    assert [Reach(first).within(8).window for first in (None, 4, 12)] == [8, 4, 8]


@pytest.mark.parametrize("width", [264, 20])
def test_heads_that_no_kernel_takes_are_not_joined_to_a_row(width, asked):
    wide = torch.randn(1, 1, 12, width, dtype=torch.float64)
    joined = Reach(None, torch.zeros(1, 12), Sequences(torch.tensor([0, 12], dtype=torch.int32), 12))
    assert flash.attend(wide, wide, wide, Reach(), 0.0, None) is None
    with pytest.raises(PartError, match=f"heads of {width} and {width} have no flash kernel"):
        flash.attend(wide, wide, wide, joined, 0.0, None)
    lengthened = torch.randn(2, 1, 12, 64, dtype=torch.float64)
    with pytest.raises(PartError, match="2 rows reach its attention instead of one"):
        flash.attend(lengthened, lengthened, lengthened, joined, 0.0, None)


def test_dialogues_that_share_rows_of_one_width_are_told_apart_by_a_mask(asked):
    rows = torch.randn(2, 1, 12, 64, dtype=torch.float64)
    shared = Reach(None, torch.tensor([[0] * 5 + [1] * 7] * 2))
    assert flash.attend(rows, rows, rows, shared, 0.0, None) is None and not asked
    assert attention._attend(rows, rows, rows, shared, 0.0, 1.0).equal(
        attention._attend(rows, rows, rows, shared.mask(12, CPU), 0.0, 1.0)
    )


@pytest.mark.parametrize(
    ("config", "takes"),
    [
        ({}, True),
        ({"head_dim": 256}, True),
        ({"head_dim": 260}, False),
        ({"head_dim": 20}, False),
        ({"head_dim": 256, "global_head_dim": 512}, False),
        ({"qk_head_dim": 192, "v_head_dim": 128}, False),
        ({"hidden_size": 40}, False),
    ],
)
def test_a_config_tells_heads_that_kernels_take(config, takes):
    assert flash.takes(AutoConfig.for_model("llama", **{"head_dim": None} | WIDE | config)) is takes


@pytest.mark.parametrize(("hidden", "takes"), [(64, True), (40, False)])
def test_a_config_that_names_no_width_of_heads_tells_it_by_their_number(hidden, takes):
    config = AutoConfig.for_model("opt", hidden_size=hidden, num_attention_heads=4)
    assert not hasattr(config, "head_dim") and flash.takes(config) is takes


def test_a_config_without_heads_says_nothing_against_them():
    assert flash.takes(AutoConfig.for_model("mamba", hidden_size=30))


def test_nothing_is_dropped_while_dropout_is_off(asked):
    tensor = torch.randn(1, 2, 6, 16, dtype=torch.float64)
    with dropout.off():
        flash.attend(tensor, tensor, tensor, Reach(), 0.5, None)  # the reference takes no other
    with pytest.raises(AssertionError):
        flash.attend(tensor, tensor, tensor, Reach(), 0.5, None)


@pytest.mark.parametrize(
    ("name", "heads", "width", "windows"), [("gemma3_text", 2, 16, (8, None)), ("opt", 1, 8, (None,))]
)
def test_every_kernel_that_layers_run_on_is_asked_once(name, heads, width, windows, asked, monkeypatch):
    model = build(name)
    attention.install(model)
    ids = torch.randint(64, (1, 30))

    def met():
        with attention.on_flash(None):
            model(input_ids=ids, use_cache=False)
        return set(flash._met)

    expected = {flash._Kernel(CPU, torch.float64, heads, width, window) for window in windows}
    assert met() == expected
    monkeypatch.setattr(flash, "_checked", set())
    monkeypatch.setattr(flash, "_problem_of", lambda kernel: None)
    flash.check_met()
    assert met() == set()


def off_by_one(real, *arguments, window, **options):
    return real(*arguments, window=window and window + 1, **options)


def one_dialogue(real, query, key, value, ends, longest, **options):
    whole = ends[-1].repeat(len(ends))
    whole[0] = 0
    return real(query, key, value, whole, int(whole[-1]), **options)


def unscaled(real, *arguments, scale, **options):
    return real(*arguments, scale=1.0, **options)


def of_a_wrong_gradient(real, query, key, *arguments, **options):
    key = key * 1.0
    key.register_hook(lambda grad: 1.5 * grad)
    return real(query, key, *arguments, **options)


@pytest.mark.parametrize(
    ("fault", "window", "message"),
    [
        (None, None, None),
        (None, 30, None),
        (off_by_one, 30, "sees 31 tokens instead of 30"),
        (one_dialogue, None, "sees 142 tokens instead of 137"),
        (unscaled, None, "is .* off"),
        (of_a_wrong_gradient, None, "is 5e-01 off"),
    ],
)
def test_a_kernel_that_sees_something_else_is_found(monkeypatch, fault, window, message):
    real = torch_internals.flash_attention_forward
    if fault is not None:
        monkeypatch.setattr(torch_internals, "flash_attention_forward", functools.partial(fault, real))
    with flash_reference.on_a_cpu():
        flash._met.add(flash._Kernel(CPU, torch.bfloat16, 2, 16, window))
        if message is None:
            flash.check_met()
        else:
            with pytest.raises(PartError, match=message):
                flash.check_met()
    assert not flash._met


def test_kernels_that_a_forecast_met_are_not_asked_of_this_device():
    with flash.as_on((9, 0)):
        flash._met.add(flash._Kernel(CPU, torch.float16, 1, 24, None))
    flash.check_met()


# On the card


TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Of the norm: a half's products are summed in fp32, and rounded once; the weights of the values are halves, too."""


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp16", "bf16"])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("groups", [4, 1], ids=["all heads", "grouped"])
@pytest.mark.parametrize("window", [None, 2, 100, 512])
@pytest.mark.parametrize(
    "lengths", [[700], [1, 300, 128, 77, 0, 0], [64] * 9 + [0] * 7], ids=["one", "several", "short"]
)
def test_kernels_are_those_of_fp64_forward_and_backward(dtype, width, groups, window, lengths):
    device = torch.device("cuda")
    tokens = sum(lengths)
    generator = torch.Generator(device).manual_seed(1)
    query, key, value, upstream = (
        torch.randn(tokens, heads, width, device=device, generator=generator).to(dtype)
        for heads in (4, groups, groups, 4)
    )
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    options: dict[str, Any] = {"window": window, "dropout": 0.0, "scale": 0.11}
    output = torch_internals.flash_attention_forward(leaves[0], leaves[1], leaves[2], ends, 700, **options)
    output.backward(upstream)
    doubles = [tensor.double() for tensor in (query, key, value)]
    expected = flash_reference.attention(*doubles, lengths, window, 0.11)
    theirs = flash_reference.gradients(upstream.double(), *doubles, lengths, window, 0.11)
    found = [output.detach(), *(leaf.grad for leaf in leaves)]
    for own, their in zip(found, (expected, *theirs), strict=True):
        assert own is not None
        assert (own.double() - their).norm() <= TOLERANCE[dtype] * their.norm() + 1e-6
        assert own.isfinite().all()


@pytest.mark.needs_cuda
def test_a_graph_takes_other_dialogues_at_every_replay():
    device, lengths = torch.device("cuda"), [[300, 84, 0, 0], [1, 200, 100, 83], [384, 0, 0, 0]]
    tensors = [torch.randn(384, heads, 128, device=device, dtype=torch.bfloat16) for heads in (8, 2, 2)]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    upstream = torch.randn_like(leaves[0])
    ends = torch.tensor([0, *itertools.accumulate(lengths[0])], dtype=torch.int32, device=device)

    def run():
        output = torch_internals.flash_attention_forward(
            leaves[0], leaves[1], leaves[2], ends, 384, window=64, dropout=0.0, scale=None
        )
        return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for each in lengths:
        ends.copy_(torch.tensor([0, *itertools.accumulate(each)]))
        graph.replay()
        doubles = [leaf.detach().double() for leaf in leaves]
        scale = 128**-0.5
        expected = [
            flash_reference.attention(*doubles, each, 64, scale),
            *flash_reference.gradients(upstream.double(), *doubles, each, 64, scale),
        ]
        for own, their in zip(found, expected, strict=True):
            assert (own.double() - their).norm() <= 1.5e-2 * their.norm()


@pytest.mark.needs_cuda
def test_the_cards_kernels_see_what_they_should():
    device = torch.device("cuda")
    assert flash.has_kernels(device, torch.bfloat16) == (torch.cuda.get_device_capability() >= (8, 0))
    for dtype, width, window in itertools.product(TOLERANCE, (64, 80, 128, 256), (None, 2, 128, 512)):
        flash._met.add(flash._Kernel(device, dtype, 2, width, window))
    flash.check_met()
