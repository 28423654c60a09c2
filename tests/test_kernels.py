"""The kernels against plain torch: on the GPU where there is one, else by Triton's interpreter, in their own process.

With Triton 3.6 to 3.8 the interpreter needs numpy before 2.4.
"""

import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import torch
from lightweight import kernels

device = "cuda" if torch.cuda.is_available() else "cpu"
seed = torch.tensor(11, device=device)


def near(found, expected, dtype):
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert difference < tolerance, (dtype, difference)


def random(*shape):
    return torch.randn(*shape, device=device)


def which_stay(x, p, seed, site):
    \"\"\"1 where an element of x is kept and 0 where it falls, by projecting ones onto each column.\"\"\"
    ones, columns = torch.ones_like(x), torch.eye(x.shape[1], device=device, dtype=x.dtype).split(16)
    return (torch.cat([kernels.project(ones, part, 1.0, p, seed, site) for part in columns], 1) != 0).float()


for dtype in (torch.float32, torch.float16) + ((torch.bfloat16,) if device == "cuda" else ()):
    for tokens, width, rank, p in ((50, 200, 4, 0.25), (256, 128, 8, 0.0), (130, 300, 20, 0.1)):
        shapes = (tokens, width), (rank, width), (tokens, rank), (tokens, width)
        x, a, grad, before = (random(*shape).to(dtype) for shape in shapes)
        kept = which_stay(x, p, seed, 4)
        assert torch.equal(kept, which_stay(x, p, seed, 4))
        assert abs(kept.mean().item() - (1 - p)) < 0.02
        if p:
            for other_seed, site in ((seed, 5), (seed + 1000, 4)):
                other = which_stay(x, p, other_seed, site)
                assert abs((other != kept).float().mean().item() - 2 * p * (1 - p)) < 0.03
        factor = kept / (1 - p)
        near(kernels.project(x, a, 2.0, p, seed, 4), 2 * (x.float() * factor) @ a.float().t(), dtype)
        grad_x = before.clone()
        grad_a = kernels.project_backward(grad, x, a, grad_x, 2.0, p, seed, 4)
        near(grad_a, 2 * grad.float().t() @ (x.float() * factor), dtype)
        near(grad_x, before.float() + 2 * (grad.float() @ a.float()) * factor, dtype)
        assert torch.equal(kernels.project_backward(grad, x, a, None, 2.0, p, seed, 4), grad_a)
    for vocabulary, columns in ((5003, 5056), (5056, 5056)):
        logits, scales = random(7, columns).to(dtype), random(7).abs()
        targets = torch.randint(vocabulary, (7,), device=device)
        reference = logits[:, :vocabulary].float().clone().requires_grad_()
        expected = torch.nn.functional.cross_entropy(reference, targets, reduction="none")
        (expected * scales).sum().backward()
        near(kernels.cross_entropy_(logits, vocabulary, targets, scales), expected, torch.float32)
        near(logits[:, :vocabulary], reference.grad, dtype)
        assert not logits[:, vocabulary:].any()
    x, weight, bias, grad = (random(*shape).to(dtype) for shape in ((3, 5, 300), (300,), (300,), (3, 5, 300)))
    for centred in (True, False):
        reference = x.float().clone().requires_grad_()
        if centred:
            expected = torch.nn.functional.layer_norm(reference, (300,), weight.float(), bias.float(), 1e-5)
        else:
            expected = torch.nn.functional.rms_norm(reference, (300,), weight.float(), 1e-5)
        expected.backward(grad.float())
        found, statistics = kernels.norm(x, weight, bias if centred else None, 1e-5, centred)
        near(found, expected, dtype)
        near(kernels.norm_backward(grad, x, weight, statistics, centred), reference.grad, dtype)
    found, positive = kernels.relu(x)
    assert torch.equal(found, torch.relu(x)) and torch.equal(positive, x > 0)
    up = random(3, 5, 300).to(dtype)
    references = [tensor.float().clone().requires_grad_() for tensor in (x, up)]
    expected = torch.nn.functional.silu(references[0]) * references[1]
    expected.backward(grad.float())
    near(kernels.gate(x, up), expected, dtype)
    for found, reference in zip(kernels.gate_backward(grad, x, up), references, strict=True):
        near(found, reference.grad, dtype)
"""


def test_kernels_compute_what_torch_does():
    pytest.importorskip("triton", reason="not run: needs Triton, which torch brings along on CUDA")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
