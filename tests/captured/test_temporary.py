"""What is otherwise while a step is checked is afterwards as it was."""

import random
from typing import Any

import numpy
import pytest
import torch

from lightweight.captured import temporary
from lightweight.captured.parts import PartError


def test_weights_of_zero_are_something_meanwhile_and_zero_again():
    zero, other = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(3))
    seen = []
    for _ in range(2):
        with temporary.nudged([zero, other]):
            seen.append(zero.detach().clone())
            assert torch.equal(other, torch.ones(3))
    assert torch.equal(*seen) and seen[0].any()
    assert not zero.any()


def test_random_numbers_and_buffers_go_on_as_if_nothing_had_been_computed():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}

    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    def seed():
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)

    seed()
    expected = draw()
    seed()
    with temporary.without_trace(network):
        network(torch.rand(3, 4)).sum().backward()
        assert network[1].num_batches_tracked == 1 and draw() != expected
    assert draw() == expected
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())
    assert all(weight.grad is None for weight in network.parameters())


class Remembers(torch.nn.Module):
    """As dynamic rotary embeddings do: the longest row, and what follows from it in a buffer made anew."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.longest: Any = 4
        self.register_buffer("turns", torch.ones(4))

    def forward(self, x):
        self.longest = torch.tensor(len(x))
        self.register_buffer("turns", torch.zeros(len(x)))
        return x * self.weight


def test_what_a_module_remembers_of_a_pass_is_as_before():
    module = Remembers()
    buffer: Any = module.turns
    with temporary.without_trace(torch.nn.Sequential(module)):
        module(torch.rand(9))
        assert len(module.get_buffer("turns")) == module.longest == 9
    assert (module.turns is buffer, module.longest) == (True, 4)
    assert torch.equal(buffer, torch.ones(4))


def test_halves_are_computed_in_fp32_and_are_the_same_bits_again():
    network = torch.nn.Linear(3, 3, dtype=torch.bfloat16)
    weight = network.weight.data
    with temporary.in_fp32(network):
        assert network(torch.ones(1, 3)).dtype == network.weight.dtype == torch.float32
    assert network.weight.data_ptr() == weight.data_ptr() and network.weight.dtype == torch.bfloat16


def test_weights_of_another_format_are_not_computed_in_fp32_and_nothing_is_changed():
    network = torch.nn.Sequential(torch.nn.Linear(3, 3, dtype=torch.bfloat16), torch.nn.Linear(3, 3).double())
    with pytest.raises(PartError, match=r"1\.weight is torch\.float64"), temporary.in_fp32(network):
        pass
    assert network[0].weight.dtype == torch.bfloat16
