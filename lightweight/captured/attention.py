"""Attention of every causal LM without masks: on flash kernels where the card has them (`flash`), else as one
`scaled_dot_product_attention`, with a mask only where one says something.

Rows are padded on the right, so causality alone keeps the padding out of every answer's sight and no mask is needed.
Flash kernels take several dialogues in one row, and a window, by numbers. Without them a mask is built where causality
does not say enough: for several dialogues in one row, and in layers that look back over a window shorter than the row.

transformers' own registries do it for the models that ask them. GPT-Neo's attention asks nobody: it uploads a constant
in every forward, which waits for the host and cannot be captured, and holds the scores of all pairs in fp32. It is
replaced here, exactly, and so is OPT's, which scales its queries in two passes of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function, sdpa_mask
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.opt.modeling_opt import OPTAttention

from lightweight.captured import flash
from lightweight.captured.flash import Reach, Sequences
from lightweight.captured.parts import PartError
from lightweight.internals import torch as torch_internals
from lightweight.internals.transformers import attention_of, say_attention

NAME = "lightweight"
"""What transformers' registries know this attention by."""

_packed: torch.Tensor | None = None
_flash: tuple[Sequences | None] | None = None


@contextmanager
def packed(dialogues: torch.Tensor | None) -> Iterator[None]:
    """Inside, tokens see only those before them with the same number in `dialogues`: [rows, time]; None for one
    dialogue a row. The registry's mask function has no argument to pass it in."""
    global _packed
    _packed = dialogues
    try:
        yield
    finally:
        _packed = None


@contextmanager
def on_flash(sequences: Sequences | None) -> Iterator[None]:
    """Inside, layers are given what their tokens see in the place of a mask, and run on flash kernels where these take
    them; `sequences` are the dialogues of a single row, None for one dialogue a row."""
    global _flash
    _flash = (sequences,)
    try:
        yield
    finally:
        _flash = None


def disable_cudnn() -> None:
    """Leave cuDNN's attention out for as long as this process lives, before the first forward pass.

    On Hopper torch prefers it. It takes 4.5 s to start where flash attention takes none, and a captured step of
    opt-350m then takes the same 9.4 ms with either (H200, torch 2.11).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def install(model: PreTrainedModel) -> Callable[[], None]:
    """Give `model`, a bare transformers model, this attention; what is returned gives it its own back.

    Whether that changes what it computes is for `agreement` to say. Raises what transformers raises for a model that
    cannot take it, and PartError for one that did not.
    """
    own = attention_of(model)
    replaced = {module: type(module) for module in model.modules() if type(module) in REPLACED}

    def undo() -> None:
        _INSTALLED.pop(model, None)
        for module, theirs in replaced.items():
            module.__class__ = theirs
        if not replaced and attention_of(model) != own:
            model.set_attn_implementation(own)
        say_attention(model, own)

    try:
        if replaced:
            for module, theirs in replaced.items():
                module.__class__ = REPLACED[theirs]
            say_attention(model, NAME)  # read where the mask is made
        else:
            model.set_attn_implementation(NAME)
        if attention_of(model) != NAME:
            raise PartError(f"{type(model).__name__} does not use transformers' AttentionInterface")
    except Exception:
        undo()
        raise
    _INSTALLED[model] = undo
    return undo


_INSTALLED: WeakKeyDictionary[torch.nn.Module, Callable[[], None]] = WeakKeyDictionary()
"""Models that have this attention, each with what gives it its own back."""


def give_back(network: torch.nn.Module) -> None:
    """Give the model in `network` its own attention back, where it has this one: that keeps no cache, and sees the
    padding on a row's left."""
    for module in list(network.modules()):
        if (undo := _INSTALLED.get(module)) is not None:
            undo()


def _mask(*arguments: Any, **options: Any) -> torch.Tensor | Reach | None:
    """What the tokens of some layers see, where that is flash's to know; else transformers' `sdpa_mask` [rows, 1, time,
    time] without the padding, and None where causality says it all.

    `sdpa_mask` itself leaves causality to the kernel only while no graph is captured, because its caller may replay
    other lengths; here a graph's shapes are static.
    """
    options["attention_mask"] = None
    if _packed is not None and options["kv_length"] != _packed.shape[1]:  # on a GPU, reading beyond it ends the process
        raise PartError(f"rows of {_packed.shape[1]} tokens are {options['kv_length']} long in its attention")
    if _flash is not None and _is_causal(options):
        return Reach(options.get("local_size"), _packed, _flash[0])
    if _packed is not None:
        inside = packed_sequence_mask_function(_packed)
        options["mask_function"] = and_masks(options.get("mask_function", causal_mask_function), inside)
        options["allow_is_causal_skip"] = False
    elif options.get("allow_is_causal_skip", True) and options["q_length"] == options["kv_length"]:
        window = options.get("local_size")
        if window is None or options["kv_length"] < window:
            return None
    return sdpa_mask(*arguments, **options)


def _is_causal(options: dict[str, Any]) -> bool:
    """Whether what a mask is asked for is causality, and a window of `local_size` where there is one: chunks have a
    size, too. Asked of the mask's own function, at a window's edges."""
    time, window = options["q_length"], options.get("local_size")
    function = options.get("mask_function", causal_mask_function)
    if options["kv_length"] != time or options.get("q_offset", 0) or options.get("kv_offset", 0):
        return False
    if not options.get("allow_is_causal_skip", True) or options.get("use_vmap", False):
        return False
    if function is causal_mask_function:
        return window is None
    if window is None or _knows_tensors(function):
        return False
    with torch_internals.with_numbers():
        places = torch.arange(time)
        begin = torch.zeros((), dtype=torch.int64)
        for at in {0, window - 1, window, window + 1, 2 * window, time // 2, time - 1} & set(range(time)):
            seen = function(begin, begin, torch.tensor(at), places)
            if not torch.equal(seen, (places <= at) & (places > at - window)):
                return False
    return True


def _knows_tensors(function: Any) -> bool:
    """Whether a function of a mask looks at more than places: to ask it would wait for the device."""
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    for value in held:
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, torch.Tensor) or (callable(each) and _knows_tensors(each)):
                return True
    return False


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | Reach | None,
    p: float,
    scale: float,
) -> torch.Tensor:
    """Attention of `query`, `key` and `value`, [rows, heads, time, width], with its share `p` dropped: [rows, time,
    heads x width]. `seen` is a mask, [rows or 1, 1, time, time], True where seen; or what stands in its place."""
    if isinstance(seen, Reach):
        output = flash.attend(query, key, value, seen, p, scale)
        if output is not None:
            return output.flatten(2)
        seen = seen.mask(query.shape[2], query.device)
    output = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, dropout_p=p, is_causal=seen is None, scale=scale
    )
    return output.transpose(1, 2).flatten(2)


class _OPTAttention(OPTAttention):
    """OPT's attention: queries are scaled by the kernel that reads them, not in a pass of their own. A power of two, as
    for heads of 64, changes no digit of them."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | Reach | None = None,
        output_attentions: bool = False,
        **_: Any,
    ) -> Any:  # as it is there, which says three and returns two
        """`hidden_states`: [rows, time, hidden]; `attention_mask` as `_attend` has it."""
        if past_key_values is not None:
            raise PartError("the captured attention trains and keeps no cache: pass use_cache=False")
        rows, time, _hidden = hidden_states.shape
        query, key, value = (
            projection(hidden_states).view(rows, time, self.num_heads, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        p = self.dropout if self.training else 0.0
        return self.out_proj(_attend(query, key, value, attention_mask, p, self.scaling)), None


UNSEEN = {"softcap", "s_aux", "position_bias"} - set(inspect.signature(sdpa_attention_forward).parameters)
"""What architectures hand to their attention and transformers' SDPA attention does not look at."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | Reach | None = None,
    **options: Any,
) -> Any:
    """As transformers' `sdpa_attention_forward`. Raises PartError for what it would leave out silently: sinks, caps and
    biases may be small enough at first for half precision to hide them."""
    asked = {name for name in (*UNSEEN, "softcap", "position_bias") if options.get(name) is not None}
    if isinstance(attention_mask, Reach) and asked <= {"softcap"}:
        p, scale, cap = options.get("dropout", 0.0), options.get("scaling"), options.get("softcap")
        output = flash.attend(query, key, value, attention_mask, p, scale, cap)
        if output is not None:
            return output, None
    for name in asked & UNSEEN:
        raise PartError(f"SDPA attention has no {name}, which {type(module).__name__} asks for")
    if isinstance(attention_mask, Reach):
        attention_mask = attention_mask.mask(query.shape[2], query.device)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


class _GPTNeoAttention(GPTNeoSelfAttention):
    """GPT-Neo's attention: scores are not scaled, and a local layer sees `window_size` tokens, itself included."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | Reach | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states`: [rows, time, hidden]; `attention_mask` as `_attend` has it."""
        if layer_past is not None:
            raise PartError("the captured attention trains and keeps no cache: pass use_cache=False")
        rows, time, _hidden = hidden_states.shape
        query, key, value = (
            projection(hidden_states).view(rows, time, self.num_heads, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.attention_type == "local":
            if isinstance(attention_mask, Reach):
                attention_mask = attention_mask.within(self.config.window_size)
            elif time > self.config.window_size:
                window = self.bias[:, :, :time, :time]  # causal, and no further back than the window
                attention_mask = window if attention_mask is None else attention_mask & window
        p = self.attn_dropout.p if self.training else 0.0
        output = _attend(query, key, value, attention_mask, p, 1.0)
        return self.resid_dropout(self.out_proj(output)), None


REPLACED: dict[type, type] = {GPTNeoSelfAttention: _GPTNeoAttention, OPTAttention: _OPTAttention}
"""Attentions that are replaced, and by what."""
