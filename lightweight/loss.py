"""Cross-entropy of a language model's head without its logits: [tokens, vocab] in fp32 is what a step's memory peaks at
otherwise, three times over.

Loss and gradients of a chunk of tokens are computed together in the forward pass, and the chunk's logits are dropped
before the next one's exist. torch 2.13's `linear_cross_entropy` has a chunked form of the same, but it weighs all
tokens alike and sums in the head's own precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

CHUNK_BYTES = 64 * 2**20
"""fp32 logits that exist at one time: 333 tokens of a vocabulary of 50 272, enough rows to keep a matrix unit busy."""


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
    `weights`: [tokens], fp32, not negative; a token of weight 0 costs time and changes nothing. Chunks are computed in
    fp32 whatever the dtype of `hidden` and `head`. Not differentiable twice.
    """
    loss: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.to(head.dtype), head, bias, targets, weights
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
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        size = max(1, CHUNK_BYTES // (4 * head.shape[0]))
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            index, weight = targets[part].unsqueeze(1), weights[part].unsqueeze(1)
            logits = linear(hidden[part], head, bias).float()  # [chunk, vocab]
            normaliser = logits.logsumexp(1, keepdim=True)
            loss += ((normaliser - logits.gather(1, index)) * weight).sum()
            if not any(ctx.needs_input_grad):
                continue
            grad = logits.sub_(normaliser).exp_()  # in place: the softmax takes the logits' memory, then the gradient
            grad.scatter_add_(1, index, torch.full_like(weight, -1.0)).mul_(weight / largest)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, head, out=grad_hidden[part])
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
