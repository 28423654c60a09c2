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
import triton
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
    ones, columns = torch.ones_like(x), torch.eye(x.shape[1], device=device, dtype=x.dtype).split(128)
    y = torch.zeros_like(x[:, :1])
    found = [kernels.add_adapter_(y, ones, part, part[:, :1].t().contiguous(), 1.0, p, seed, site) for part in columns]
    return (torch.cat(found, 1) != 0).float()


# rows and columns that fill no tile; the last ones beyond what is narrow
shapes = (
    (40, 200, 136, 4, 0.25),
    (32, 128, 300, 8, 0.0),
    (34, 300, 128, 20, 0.1),
    (20, 1100, 130, 4, 0.25),
    (70, 64, 1100, 4, 0.0),
)
for dtype in (torch.float32, torch.float16) + ((torch.bfloat16,) if device == "cuda" else ()):
    for tokens, width, out, rank, p in shapes:
        x, a, b, grad, before = (
            random(*shape).to(dtype)
            for shape in ((tokens, width), (rank, width), (out, rank), (tokens, out), (tokens, width))
        )
        kept = which_stay(x, p, seed, 4)
        assert torch.equal(kept, which_stay(x, p, seed, 4))
        assert abs(kept.mean().item() - (1 - p)) < 0.03
        if p:
            for other_seed, site in ((seed, 5), (seed + 1000, 4)):
                other = which_stay(x, p, other_seed, site)
                assert abs((other != kept).float().mean().item() - 2 * p * (1 - p)) < 0.04
        factor = kept / (1 - p)
        whole = random(tokens, 2 * out).to(dtype)
        y = whole[:, out:]  # a part of rows that lie further apart
        expected = 2 * (x.float() * factor) @ a.float().t()
        sum_ = y.float() + expected.to(dtype).float() @ b.float().t()
        left = whole[:, :out].clone()
        inner = kernels.add_adapter_(y, x, a, b, 2.0, p, seed, 4)
        near(inner, expected, dtype)
        near(y, sum_, dtype)
        assert torch.equal(whole[:, :out], left)
        grad_x = before.clone()
        grad_a, grad_b = kernels.adapter_backward(grad, inner, x, a, b, grad_x, 2.0, p, seed, 4)
        reached = (grad.float() @ b.float()).to(dtype).float()
        near(grad_a, 2 * reached.t() @ (x.float() * factor), dtype)
        near(grad_b, grad.float().t() @ inner.float(), dtype)
        near(grad_x, before.float() + 2 * (reached @ a.float()) * factor, dtype)
        again = kernels.adapter_backward(grad, inner, x, a, b, None, 2.0, p, seed, 4)
        assert torch.equal(again[0], grad_a) and torch.equal(again[1], grad_b)
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
    branch, residual, other = (random(3, 5, 300).to(dtype) for _ in range(3))
    for p in (0.0, 0.25):
        result, total, statistics = kernels.add_norm(branch, residual, weight, bias, 1e-5, p, seed, 9)
        factor = torch.full_like(x, 1 / (1 - p), dtype=torch.float32)
        if p:
            ones, zeros = torch.ones_like(branch), torch.zeros_like(residual)
            factor *= (kernels.add_norm(ones, zeros, weight, bias, 1e-5, p, seed, 9)[1] != 0).float()
            assert abs((factor != 0).float().mean().item() - (1 - p)) < 0.03
        references = [tensor.float().clone().requires_grad_() for tensor in (branch, residual)]
        sum_ = references[1] + references[0] * factor
        near(total, sum_, dtype)
        expected = torch.nn.functional.layer_norm(sum_, (300,), weight.float(), bias.float(), 1e-5)
        near(result, expected, dtype)
        expected.backward(grad.float() + other.float())
        pair = kernels.add_norm_backward([grad, other], total, weight, statistics, p, seed, 9)
        for found, reference in zip(pair, references, strict=True):
            near(found, reference.grad, dtype)
        together = (grad.float() + other.float()).to(dtype)
        for found, expected in zip(
            kernels.add_norm_backward([together], total, weight, statistics, p, seed, 9), pair, strict=True
        ):
            near(found, expected, dtype)
    found, positive = kernels.relu(x)
    assert torch.equal(found, torch.relu(x)) and positive.numel() == -(-x.numel() // 8)
    assert torch.equal(kernels.relu_backward(grad, positive), torch.where(x > 0, grad, 0))
    up = random(3, 5, 300).to(dtype)
    references = [tensor.float().clone().requires_grad_() for tensor in (x, up)]
    expected = torch.nn.functional.silu(references[0]) * references[1]
    expected.backward(grad.float())
    near(kernels.gate(x, up), expected, dtype)
    for found, reference in zip(kernels.gate_backward(grad, x, up), references, strict=True):
        near(found, reference.grad, dtype)


def adapt(width):
    x, a, b, grad, y = (
        random(*shape).half() for shape in ((48, width), (40, width), (width, 40), (48, width), (48, width))
    )  # a rank that nothing above has
    before = y.clone()
    inner = kernels.add_adapter_(y, x, a, b, 2.0, 0.1, seed, 4)
    kernels.adapter_backward(grad, inner, x, a, b, torch.zeros_like(x), 2.0, 0.1, seed, 4)
    return not torch.equal(y, before)


compiled = []
if device == "cuda":
    triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name)
with kernels.compiling():
    assert not adapt(256), "a kernel was launched"
    adapt(1280)
assert len(compiled) == (4 if device == "cuda" else 0), compiled
assert adapt(256), "no kernel was launched"
adapt(1280)
assert len(compiled) == (4 if device == "cuda" else 0), f"compiled anew: {compiled[4:]}"
"""


def test_kernels_compute_what_torch_does():
    pytest.importorskip("triton", reason="not run: needs Triton, which torch brings along on CUDA")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
