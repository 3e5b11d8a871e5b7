"""What was taken apart and joined again costs nothing, and only where it is the same again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxhess
from tests.reference import check, mlp


class Before(nn.Module):
    """A net of something made of x."""

    def __init__(self, function):
        super().__init__()
        self.net = mlp(4, 8, 8, 1)
        self.function = function

    def forward(self, x):
        return self.net(self.function(x))


SAME = {
    "columns": lambda x: torch.cat([x[:, i : i + 1] for i in range(4)], -1),
    "stacked": lambda x: torch.stack([x[:, i] for i in range(4)], -1),
    "unbound": lambda x: torch.stack(x.unbind(-1), -1),
    "split": lambda x: torch.cat(x.split([1, 3], -1), -1),
    "chunks of chunks": lambda x: torch.cat(
        [torch.cat(c.chunk(2, -1), -1) for c in x.chunk(2, -1)], 1
    ),
    "flipped twice": lambda x: x.flip(-1).flip(-1),
    "rolled": lambda x: x.roll(1, -1).roll(3, -1),
    "of something": lambda x: torch.cat(torch.sin(x).chunk(2, -1), -1),
}  # fmt: skip
OTHER = {
    "swapped": lambda x: torch.cat([x[:, 2:], x[:, :2]], -1),
    "repeated": lambda x: torch.cat([x[:, :2], x[:, :2]], -1),
    "of two": lambda x: torch.cat([x[:, :2], torch.sin(x)[:, 2:]], -1),
    "a constant": lambda x: torch.cat([x[:, :3], torch.ones_like(x[:, 3:])], -1),
    "sorted": lambda x: x.sort(-1).values,
    "scaled": lambda x: torch.cat([x[:, :2], 2 * x[:, 2:]], -1),
    "transposed once": lambda x: x.view(-1, 2, 2).mT.reshape(-1, 4),
    "flipped": lambda x: x.flip(-1),
}


def _operations(model, x):
    code = fxhess.transform(model).graph_module(x).code
    return code.count("torch.")


@pytest.mark.parametrize("name", SAME)
def test_the_same_again_costs_nothing(name):
    x = torch.randn(5, 4, dtype=torch.float64)
    model = Before(SAME[name]).double()
    plain = Before(torch.sin if name == "of something" else lambda x: x).double()
    check(model, x)
    assert _operations(model, x) == _operations(plain, x)


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_the_same_is_left(name):
    x = torch.randn(5, 4, dtype=torch.float64)
    check(Before(OTHER[name]).double(), x)


def test_the_same_as_an_intermediate_one():
    x = torch.randn(5, 4, dtype=torch.float64)
    turned = Before(lambda x: x.view(-1, 2, 2).mT.flip(-1).mT.flip(1).reshape(-1, 4))
    plain = Before(lambda x: x.view(-1, 2, 2).reshape(-1, 4))
    check(turned, x)
    assert _operations(turned, x) == _operations(plain, x)


def test_the_result_itself():
    x = torch.randn(5, 4, dtype=torch.float64)
    net = mlp(4, 6, 2)

    def model(x):
        y = net(x)
        return torch.cat([y[:, :1], y[:, 1:]], -1)

    torch.testing.assert_close(fxhess.transform(model)(x), fxhess.transform(net)(x))


def test_several_inputs_cost_what_one_does():
    net = mlp(4, 8, 8, 1)

    def model(a, b):
        return net(torch.cat([a, b], -1))

    x = torch.randn(5, 4, dtype=torch.float64)
    several = fxhess.transform(model, wrt=("a", "b"))
    code = several.graph_module(x[:, :1], x[:, 1:]).code
    assert "cat" not in code and "slice" not in code
    H = several(x[:, :1], x[:, 1:])
    whole = fxhess.transform(net)(x)
    joined = torch.cat([torch.cat(row, -1) for row in H], -2)
    torch.testing.assert_close(joined, whole)
