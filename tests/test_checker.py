"""The checker of rules rejects wrong ones: each kind of mistake, by ``check_rule``."""

from __future__ import annotations

import pytest
import torch
from reference import randn

import fxhess
from fxhess.errors import RuleError, UnsupportedOpError
from fxhess.kinds import (
    Along,
    Einsum,
    Elementwise,
    Equation,
    Linear,
    Multilinear,
    Pointwise,
    Smooth,
    Trailing,
    Zero,
)
from fxhess.registry import Rule, find, rules
from fxhess.testing import Sample, check_rule, check_sample

pytestmark = pytest.mark.usefixtures("rule_table")


def _differentiable(name, forward, backward):
    """A private operator with a gradient that PyTorch can differentiate again."""
    op = torch.library.custom_op(f"fxhess_tests::{name}", forward, mutates_args=())
    op.register_fake(forward)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    op.register_autograd(
        lambda ctx, g: backward(g, *ctx.saved_tensors), setup_context=setup_context
    )
    return getattr(torch.ops.fxhess_tests, name)


def _cube(x: torch.Tensor) -> torch.Tensor:
    return x * x * x


def _scan(x: torch.Tensor) -> torch.Tensor:
    return x.cumsum(-1)


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x @ y


def _square_norm(x: torch.Tensor) -> torch.Tensor:
    return x * (x * x).sum(-1, keepdim=True)


def _centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0, keepdim=True)


cube = _differentiable("cube", _cube, lambda g, x: 3 * x * x * g)
scan = _differentiable("scan", _scan, lambda g, x: g.flip(-1).cumsum(-1).flip(-1))
product = _differentiable("product", _product, lambda g, x, y: (g @ y.mT, x.mT @ g))
square_norm = _differentiable(
    "square_norm",
    _square_norm,
    lambda g, x: g * (x * x).sum(-1, keepdim=True) + 2 * x * (g * x).sum(-1, keepdim=True),
)
centred = _differentiable("centred", _centred, lambda g, x: g - g.mean(0, keepdim=True))
M = randn(4, 5, seed=1)


def _with_matrix(x):
    return product(x.sin(), M)


def _pull_scan(g, c):
    return torch.flip(torch.cumsum(torch.flip(g, [-1]), -1), [-1])


def _dot(a, b):
    return (a * b).sum(-1, keepdim=True)


def _push_norm(c, t):
    (x,) = c.operands
    return t * _dot(x, x) + 2 * x * _dot(x, t)


def _curve_norm(c, g, i, j, t):
    (x,) = c.operands
    return 2 * (g * _dot(x, t) + t * _dot(g, x) + x * _dot(g, t))


def _elementwise(first, second):
    return Pointwise(), Elementwise((first,), {(0, 0): second})


RIGHT = {  # operator: use of it, axes, kind
    cube.default: (cube, *_elementwise(lambda y, x: 3 * x * x, lambda y, x: 6 * x)),
    scan.default: (scan, Trailing(1), Linear(_pull_scan)),
    product.default: (
        _with_matrix,
        Einsum(lambda a: Equation((("i", "k"), ("k", "j")), ("i", "j"))),
        Multilinear(),
    ),
    square_norm.default: (
        square_norm,
        Trailing(1),
        Smooth(_push_norm, lambda g, c: _push_norm(c, g), _curve_norm),
    ),
}

WRONG = {  # mistake: (use, operator, axes, kind, what the checker says)
    "wrong f'": (
        cube, *_elementwise(lambda y, x: 2 * x * x, lambda y, x: 6 * x), "gradient: off by",
    ),
    "wrong f''": (
        cube, *_elementwise(lambda y, x: 3 * x * x, lambda y, x: 5 * x), "hessian: off by",
    ),
    "forgotten f''": (cube, *_elementwise(lambda y, x: 3 * x * x, 0), "hessian: off by"),
    "f' right to 8 digits": (
        cube,
        *_elementwise(lambda y, x: 3.00000003 * x * x, lambda y, x: 6 * x),
        "gradient: off by",
    ),
    "no derivative at all": (cube, Pointwise(), Zero(), "gradient: off by"),
    "f'' not finite": (
        cube, *_elementwise(lambda y, x: 3 * x * x, lambda y, x: x / 0.0), "hessian: off by",
    ),
    "wrong pull": (scan, Trailing(1), Linear(lambda g, c: torch.cumsum(g, -1)), "gradient"),
    "wrong push": (
        scan, Trailing(1), Linear(_pull_scan, lambda c, t: t + torch.cumsum(t, -1)), "hessian",
    ),
    "mixing axes called pointwise": (scan, Pointwise(), Linear(_pull_scan), "hessian: off by"),
    "wrong curve": (
        square_norm,
        Trailing(1),
        Smooth(_push_norm, lambda g, c: _push_norm(c, g),
               lambda c, g, i, j, t: 2 * _curve_norm(c, g, i, j, t)),
        "hessian: off by",
    ),
    "curve that is not symmetric": (
        square_norm,
        Trailing(1),
        Smooth(_push_norm, lambda g, c: _push_norm(c, g),
               lambda c, g, i, j, t: 2 * (g * _dot(c.operands[0], t))),
        "hessian: off by",
    ),
    "batch axis called another sample's own": (
        centred, Pointwise(), Linear(lambda g, c: g), "gradient: off by",
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", RIGHT, ids=str)
def test_a_right_rule_passes(op):
    use, axes, kind = RIGHT[op]
    fxhess.register_rule(Rule(op, axes, kind))
    check_rule(use)


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_rule_is_caught(mistake):
    use, axes, kind, message = WRONG[mistake]
    fxhess.register_rule(Rule(use.default, axes, kind))
    with pytest.raises(RuleError, match=message):
        check_rule(use)
    # By each of the models of which the suite takes one: dense tangents ask for no axes.
    for turn in range(1 if mistake == "mixing axes called pointwise" else 2):
        with pytest.raises(RuleError, match=message):
            check_sample(Sample(mistake, use), turn=turn)


def test_a_wrong_equation_is_caught():
    square = randn(4, 4, seed=2)
    transposed = Einsum(lambda a: Equation((("i", "k"), ("j", "k")), ("i", "j")))
    fxhess.register_rule(Rule(product.default, transposed, Multilinear()))
    with pytest.raises(RuleError, match="value: off by"):
        check_rule(lambda x: product(x.sin(), square))


def test_a_wrong_scale_is_caught():
    doubled = Einsum(lambda a: Equation((("i", "k"), ("k", "j")), ("i", "j"), scale=2.0))
    fxhess.register_rule(Rule(product.default, doubled, Multilinear()))
    with pytest.raises(RuleError, match="value: off by"):
        check_rule(_with_matrix)


def test_mixing_along_an_axis_that_the_rule_does_not_name_is_caught():
    """Along(dim) with the wrong axis passed through."""
    fxhess.register_rule(
        Rule(torch.ops.aten.cumsum.default, Pointwise(), Linear(_pull_scan)), override=True
    )
    with pytest.raises(RuleError, match="hessian: off by"):
        check_rule(lambda x: torch.cumsum(x, -1))


WRONG_TANH = [
    (lambda y, x: 1 - y, lambda y, x: -2 * y * (1 - y * y)),
    (lambda y, x: 1 - y * y, lambda y, x: 2 * y * (1 - y * y)),
]


@pytest.mark.parametrize("first, second", WRONG_TANH)
def test_an_override_is_checked_like_any_rule(first, second):
    tanh = torch.ops.aten.tanh.default
    check_rule(torch.tanh)
    fxhess.register_rule(Rule(tanh, *_elementwise(first, second)), override=True)
    with pytest.raises(RuleError, match="tanh"):
        check_rule(torch.tanh)


def test_a_missing_rule_is_named():
    """Where none can be derived either: PyTorch has no derivative of it."""
    op = torch.library.custom_op(
        "fxhess_tests::opaque", lambda x: x.exp(), mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    op.register_fake(torch.empty_like)
    with pytest.raises(UnsupportedOpError, match=r"fxhess_tests\.opaque\.default") as caught:
        fxhess.transform(lambda x: op(x).sum(-1))(randn(3, 4))
    assert "register_rule" in str(caught.value) and "test_checker.py" in str(caught.value)


def test_a_rule_is_registered_once():
    rule = Rule(cube.default, *_elementwise(lambda y, x: 3 * x * x, lambda y, x: 6 * x))
    assert fxhess.register_rule(rule) is rule
    assert find(cube.default) is rule and rule in list(rules())
    with pytest.raises(RuleError, match="has a rule already"):
        fxhess.register_rule(rule)
    fxhess.register_rule(rule, override=True)


def test_a_rule_is_for_an_overload():
    with pytest.raises(RuleError, match="one operator overload"):
        fxhess.register_rule(Rule(torch.tanh, Pointwise(), Zero()))
    with pytest.raises(RuleError, match=r"torch\.ops\.aten\.tanh\.default"):
        fxhess.register_rule(Rule(torch.ops.aten.tanh, Along(), Zero()))


def test_tolerance_and_domain_are_the_samples_own():
    root = Sample("sqrt", torch.sqrt, make=fxhess.testing.uniform(0.5, 2.0), twice=False)
    check_sample(root)
    drawn = root.draw(3)
    assert ((drawn >= 0.5) & (drawn < 2.0)).all()
    assert torch.equal(root.draw(3), root.draw(3))
    assert not torch.equal(root.draw(3), root.draw(4))
