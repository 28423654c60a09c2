"""Attention of every causal LM as one `scaled_dot_product_attention`, with a mask only where one says something.

Rows are padded on the right, so causality alone keeps the padding out of every answer's sight and no mask is needed. A
mask is built where causality does not say enough: for several dialogues in one row, and in layers that look back over a
window shorter than the row.

transformers' own registries do it for the models that ask them. GPT-Neo's attention asks nobody: it uploads a constant
in every forward, which waits for the host and cannot be captured, and holds the scores of all pairs in fp32. It is
replaced here, exactly, and so is OPT's, which scales its queries in two passes of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function, sdpa_mask
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.opt.modeling_opt import OPTAttention

from lightweight.captured.agreement import PartError
from lightweight.internals.transformers import attention_of, say_attention

NAME = "lightweight"
"""What transformers' registries know this attention by."""

_packed: torch.Tensor | None = None


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
            raise PartError(f"{type(model).__name__} does not ask transformers' AttentionInterface")
    except Exception:
        undo()
        raise
    return undo


def _mask(*arguments: Any, **options: Any) -> torch.Tensor | None:
    """transformers' `sdpa_mask` [rows, 1, time, time] without the padding, and None where causality says it all.

    `sdpa_mask` itself leaves causality to the kernel only while no graph is captured, because its caller may replay
    other lengths; here a graph's shapes are static.
    """
    options["attention_mask"] = None
    if _packed is not None:
        if options["kv_length"] != _packed.shape[1]:  # on a GPU, what reads beyond it ends the process
            raise PartError(f"rows of {_packed.shape[1]} tokens are {options['kv_length']} long in its attention")
        inside = packed_sequence_mask_function(_packed)
        options["mask_function"] = and_masks(options.get("mask_function", causal_mask_function), inside)
        options["allow_is_causal_skip"] = False
    elif options.get("allow_is_causal_skip", True) and options["q_length"] == options["kv_length"]:
        window = options.get("local_size")
        if window is None or options["kv_length"] < window:
            return None
    return sdpa_mask(*arguments, **options)


class _OPTAttention(OPTAttention):
    """OPT's attention: queries are scaled by the kernel that reads them, not in a pass of their own. A power of two, as
    for heads of 64, changes no digit of them."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        **_: Any,
    ) -> Any:  # as it is there, which says three and returns two
        """`hidden_states`: [rows, time, hidden]; `attention_mask`: [rows or 1, 1, time, time], True where seen."""
        if past_key_values is not None:
            raise PartError("the captured attention trains and keeps no cache: pass use_cache=False")
        rows, time, _hidden = hidden_states.shape
        query, key, value = (
            projection(hidden_states).view(rows, time, self.num_heads, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        output = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=attention_mask is None,
            scale=self.scaling,
        )
        return self.out_proj(output.transpose(1, 2).reshape(rows, time, self.embed_dim)), None


UNSEEN = {"softcap", "s_aux", "position_bias"} - set(inspect.signature(sdpa_attention_forward).parameters)
"""What architectures hand to their attention and transformers' SDPA attention does not look at."""


def _attention(module: torch.nn.Module, *tensors: torch.Tensor | None, **options: Any) -> Any:
    """transformers' `sdpa_attention_forward`. Raises PartError for what it would leave out silently: sinks,
    caps and biases may be small enough at first for half precision to hide them."""
    for name in UNSEEN:
        if options.get(name) is not None:
            raise PartError(f"SDPA attention has no {name}, which {type(module).__name__} asks for")
    return sdpa_attention_forward(module, *tensors, **options)  # type: ignore[arg-type]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


class _GPTNeoAttention(GPTNeoSelfAttention):
    """GPT-Neo's attention: scores are not scaled, and a local layer sees `window_size` tokens, itself included."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states`: [rows, time, hidden]; `attention_mask`: [rows or 1, 1, time, time], True where seen."""
        if layer_past is not None:
            raise PartError("the captured attention trains and keeps no cache: pass use_cache=False")
        rows, time, _hidden = hidden_states.shape
        query, key, value = (
            projection(hidden_states).view(rows, time, self.num_heads, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.attention_type == "local" and time > self.config.window_size:
            window = self.bias[:, :, :time, :time]  # causal, and no further back than the window
            attention_mask = window if attention_mask is None else attention_mask & window
        output = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=self.attn_dropout.p if self.training else 0.0,
            is_causal=attention_mask is None,
            scale=1.0,
        )
        output = self.out_proj(output.transpose(1, 2).reshape(rows, time, self.embed_dim))
        return self.resid_dropout(output), None


REPLACED: dict[type, type] = {GPTNeoSelfAttention: _GPTNeoAttention, OPTAttention: _OPTAttention}
"""Attentions that are replaced, and by what."""
