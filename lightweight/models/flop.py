"""How much arithmetic does training a model take, by the papers' count? What a step's share of a card's peak is of.

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


def flop_per_token(network: Any, length: float) -> float:
    """Multiplications and additions that a token takes to be trained on, in rows of `length` tokens."""
    config = network.config.get_text_config()
    frozen, trained = multiplied_weights(network)
    forward_and_inputs = FORWARD + BACKWARD_OF_INPUTS
    products = forward_and_inputs * frozen + (forward_and_inputs + BACKWARD_OF_WEIGHTS) * trained
    return products + OF_ATTENTION * _width(config) * sum(min(length, window) for window in _windows(config, length))


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


def _width(config: Any) -> int:
    """The numbers of all heads of a layer together."""
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * int(width)


def _windows(config: Any, length: float) -> list[float]:
    """How far each layer's attention looks back."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    if not kinds or not window:
        return [length] * int(config.num_hidden_layers)
    return [int(window) if kind in ("sliding_attention", "local") else length for kind in kinds]
