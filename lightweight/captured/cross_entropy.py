"""Cross-entropy of a language model's head without its logits: [tokens, vocab] in fp32 is what a step's memory peaks at
otherwise, three times over.

Loss and gradients of a chunk of tokens are computed together in the forward pass, and the chunk's logits are dropped
before the next one's exist. torch 2.13's `linear_cross_entropy` has a chunked form of the same, but it weighs all
tokens alike and sums in the head's own precision.
"""

from __future__ import annotations

from typing import Any

import torch

from lightweight.captured import kernels, launching

CHUNK_BYTES = 64 * 2**20
"""Logits that exist at one time: 640 tokens of a vocabulary of 50 272 in half precision."""

CHUNK_TOKENS = 512
"""But so many tokens at the least: of fewer, products read the head more often than they are worth. 128 of Gemma's 262
144 logits, which are 64 MiB, had 330 TFLOP/s of an H100's 750. The backward pass of a layer takes as much memory."""

TILE = 128
"""What the tokens of a chunk are a multiple of: rows of a matrix product's tile."""

ALIGNMENT = 64
"""What a matrix product's sizes should be multiples of: for GPT-Neo's vocabulary of 50 257 cuBLAS otherwise falls back
to kernels that load one element at a time, which took 5 of the 43 ms of a step (H200)."""


def linear_cross_entropy(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The sum over tokens of `weights` times the cross-entropy (nats) of `hidden @ head.T + bias` against `targets`: a
    scalar, fp32.

    `hidden`: [tokens, hidden]; `head`: [vocab, hidden]; `bias`: [vocab]; `targets`: [tokens], class indices;
    `weights`: [tokens], fp32, not negative; a token of weight 0 costs time and changes nothing. Softmax and loss
    are computed in fp32 whatever the dtype of `hidden` and `head`. Under autocast the logits are products in its dtype,
    as a head's are, and everything else is as outside of it. Not differentiable twice.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
    with torch.autocast(device, enabled=False):  # it would round the sum over tokens, which is a product too
        loss: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype), targets, weights
        )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        needs_hidden, needs_head, needs_bias, *_ = ctx.needs_input_grad
        # Weights are around one over the tokens of a step. fp16 gradients keep more digits relative to the largest one.
        largest = weights.max().clamp_min(torch.finfo(torch.float32).tiny)
        scales = weights / largest
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        tokens, vocabulary = hidden.shape[0], head.shape[0]
        size = min(tokens, chunk_tokens(vocabulary, head.element_size()))
        buffer = torch.empty(size, -(-vocabulary // ALIGNMENT) * ALIGNMENT, dtype=head.dtype, device=head.device)
        # A product in bf16 on Intel's AMX reads on to the end of a tile, and multiplies what it finds there by zero:
        # where the memory had held a NaN, gradients were NaN (torch 2.13).
        buffer[:, vocabulary:] = 0
        aligned = vocabulary // ALIGNMENT * ALIGNMENT
        for start in range(0, tokens, size):
            part = slice(start, start + size)
            chunk = buffer[: min(size, tokens - start)]
            torch.mm(hidden[part], head[:aligned].t(), out=chunk[:, :aligned])
            torch.mm(hidden[part], head[aligned:].t(), out=chunk[:, aligned:vocabulary])
            if bias is not None:
                chunk[:, :vocabulary] += bias
            losses = _cross_entropy_(chunk, vocabulary, targets[part], scales[part])
            loss += losses @ weights[part]
            grad = chunk[:, :vocabulary]  # the logits' memory holds it now
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                torch.mm(grad[:, :aligned], head[:aligned], out=grad_hidden[part])
                grad_hidden[part].addmm_(grad[:, aligned:], head[aligned:])
            if grad_head is not None:
                grad_head += grad.t() @ hidden[part]
        ctx.save_for_backward(largest, grad_hidden, grad_head, grad_bias)
        ctx.dtypes = head.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        largest, grad_hidden, grad_head, grad_bias = ctx.saved_tensors
        head_dtype, bias_dtype = ctx.dtypes
        scale = grad_output * largest
        return (
            # in fp32: with a loss scale in it, `scale` may be beyond fp16
            None if grad_hidden is None else grad_hidden.float().mul_(scale).to(grad_hidden.dtype),
            None if grad_head is None else (grad_head * scale).to(head_dtype),
            None if grad_bias is None else (grad_bias * scale).to(bias_dtype),
            None,
            None,
        )


def chunk_tokens(vocabulary: int, size: int) -> int:
    """How many tokens' logits exist at one time, in numbers of `size` bytes."""
    return max(CHUNK_TOKENS, CHUNK_BYTES // (size * vocabulary) // TILE * TILE)


def _cross_entropy_(logits: torch.Tensor, vocabulary: int, targets: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Each row's cross-entropy, [tokens], fp32; the first `vocabulary` columns of `logits` then hold `scales` times its
    gradient, and the rest means nothing before and after."""
    if launching.take(logits):
        return kernels.cross_entropy_(logits, vocabulary, targets, scales)
    whole, index = logits[:, :vocabulary].float(), targets.unsqueeze(1)
    normaliser = whole.logsumexp(1, keepdim=True)
    losses = (normaliser - whole.gather(1, index)).squeeze(1)
    grad = (whole - normaliser).exp_()
    grad.scatter_add_(1, index, torch.full_like(losses, -1.0).unsqueeze(1)).mul_(scales.unsqueeze(1))
    logits[:, :vocabulary] = grad
    return losses
