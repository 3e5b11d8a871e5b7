"""Random architectures, shapes and batch sizes against the referees, in float64."""

from __future__ import annotations

import torch
from architectures import SMOOTH, Network, cases, recipes
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ALL, assert_close, check, randn

import fxhess
from fxhess import oracle


def _inputs(recipe, batch, seed=0):
    return randn(*batch, *recipe.event, seed=seed)


@settings(max_examples=50)
@given(cases(), st.integers(0, 99))
def test_all_outputs_are_those_of_double_backward(case, seed):
    recipe, batch = case
    check(Network(recipe), _inputs(recipe, batch, seed), len(recipe.event))


@settings(max_examples=12)
@given(cases(tuple(SMOOTH), max_batch=2))
def test_hessian_is_that_of_central_differences(case):
    recipe, batch = case
    network, x = Network(recipe), 0.5 * _inputs(recipe, batch)
    n = len(recipe.event)
    got = fxhess.transform(network, event_ndim=n)(x)
    if x.numel():
        assert_close(got, oracle.differences(network, x, n, step=1e-3), 1e-3)


@settings(max_examples=12)
@given(cases())
def test_strategies_agree(case):
    recipe, batch = case
    network, x = Network(recipe), _inputs(recipe, batch)
    n = len(recipe.event)
    close, rebase = (
        fxhess.transform(network, ALL, event_ndim=n, strategy=s)(x) for s in ("close", "rebase")
    )
    for name in ALL:
        assert_close(getattr(rebase, name), getattr(close, name), what=name)


@settings(max_examples=12)
@given(recipes(), st.lists(st.integers(0, 5), min_size=3, max_size=3))
def test_one_program_serves_every_batch_size(recipe, sizes):
    network, n = Network(recipe), len(recipe.event)
    hess = fxhess.transform(network, event_ndim=n)
    before = fxhess.cache_info().misses
    for seed, size in enumerate(sizes):
        batch = [size, 2, 1][: recipe.batch_ndim]
        x = _inputs(recipe, batch, seed)
        got = hess(x)
        if x.numel():
            assert_close(got, oracle.hessian(network, x, n))
    assert fxhess.cache_info().misses <= before + 1


@settings(max_examples=8)
@given(cases(max_batch=3))
def test_outputs_do_not_depend_on_what_else_is_asked_for(case):
    recipe, batch = case
    network, x = Network(recipe), _inputs(recipe, batch)
    n = len(recipe.event)
    together = fxhess.transform(network, ALL, event_ndim=n)(x)
    for name in ALL:
        alone = fxhess.transform(network, name, event_ndim=n)(x)
        assert isinstance(alone, torch.Tensor)
        assert_close(alone, getattr(together, name), 1e-13, what=name)
