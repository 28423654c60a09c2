"""How many FLOP does training a model take? Model FLOP utilization, a step's share of the card's peak, is based on it.

A token is multiplied with every weight once: two operations a weight in the forward pass, two for the gradient of what
was multiplied, and two more for the gradient of the weight where it is trained. So 6 a weight, and 4 a frozen one.
Weights that are only looked up, embeddings, are none of them; a head is, also one that is tied to the embeddings.
Attention takes 12 operations for each layer, each number of its heads and each token of the row: PaLM, appendix B
(https://arxiv.org/abs/2204.02311), which does not take off what causality leaves out. What is computed again, to save
memory, is not counted: a share of the peak is of what training needs, not of what a step does.
"""

from __future__ import annotations

from typing import Any

FORWARD, BACKWARD_OF_INPUTS, BACKWARD_OF_WEIGHTS = 2, 2, 2
"""Operations a weight and token, a multiplication and an addition."""

OF_ATTENTION = 12
"""Two products of two operations, forward, and twice that backward."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configurations call the number of experts, of which each token sees `num_experts_per_tok`."""


LINEAR = ("linear_attention", "conv", "mamba", "recurrent")
"""What configurations call a layer that looks at no pairs of tokens. Such a layer's own state is not counted: it takes
little beside the layer's weights."""


def flop_per_token(network: Any, length: float) -> float | None:
    """Multiplications and additions that a token takes to be trained on, in rows of `length` tokens; None where the
    model's configuration does not say what its attention is like."""
    try:
        pairs = _pairs(network.config.get_text_config(), length)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # a count is no reason to lose a trial
        return None
    frozen, trained = multiplied_weights(network)
    forward_and_inputs = FORWARD + BACKWARD_OF_INPUTS
    return forward_and_inputs * frozen + (forward_and_inputs + BACKWARD_OF_WEIGHTS) * trained + OF_ATTENTION * pairs


def multiplied_weights(network: Any) -> tuple[float, float]:
    """The weights that a token is multiplied with, frozen ones and trained ones."""
    from torch import nn

    from lightweight.internals.bitsandbytes import count_elements

    config = network.config.get_text_config()
    experts = next((count for name in EXPERTS if (count := getattr(config, name, None))), None)
    share = getattr(config, "num_experts_per_tok", None) or 1
    counts = [0.0, 0.0]
    for name, module in network.named_modules():
        parts = name.split(".")
        if isinstance(module, nn.Embedding) or "original_module" in parts:
            continue
        for weight in module.parameters(recurse=False):
            if weight.dim() < 2 and not hasattr(weight, "quant_state"):
                continue
            of_experts = experts is not None and "experts" in parts
            counts[weight.requires_grad] += count_elements(weight) * (share / experts if of_experts and experts else 1)
    return counts[False], counts[True]


def _pairs(config: Any, length: float) -> float:
    """The numbers of all heads of a layer, times how far back its attention looks, over all layers."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    layers = getattr(config, "per_layer_config", None) or [config] * int(config.num_hidden_layers)
    return sum(
        _width(layer) * _reach(layer, kind, length)
        for layer, kind in zip(layers, kinds or [None] * len(layers), strict=True)
        if kind not in LINEAR
    )


def _width(config: Any) -> int:
    """The numbers of all heads of a layer together."""
    heads = int(config.num_attention_heads)
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _reach(config: Any, kind: str | None, length: float) -> float:
    """How far back a layer's attention looks."""
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    return min(length, int(window)) if window and kind in ("sliding_attention", "local") else length
