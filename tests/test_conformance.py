"""A fixed part of the conformance with PyTorch's tables, and the conformance runner itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conformance import cases, records, report
from conformance._pytorch import Entry, Use, entries
from conformance.judge import CORRECTED, Outcome, Referee, judge
from reference import randn

import fxhess
from fxhess import kinds, registry

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"

# A few of each family; `python -m tests.conformance` runs all.
FIXED = (
    "atan2", "clamp", "special.entr", "prod", "var", "logsumexp", "cumprod", "softmax", "sort",
    "gather", "index_add", "scatter_reduce.prod", "masked_fill", "roll", "diag_embed", "matmul",
    "einsum", "linalg.inv", "linalg.slogdet", "linalg.lstsq", "fft.rfft",
    "nn.functional.conv2d", "nn.functional.max_pool2d", "nn.functional.layer_norm",
    "nn.functional.batch_norm", "nn.functional.scaled_dot_product_attention",
    "nn.functional.grid_sample", "nn.functional.cross_entropy", "nn.functional.dropout",
    "as_strided", "nn.GELU", "nn.LSTM (evaluated)", "nn.BatchNorm1d (training)",
    "nn.MultiheadAttention (evaluated)", "nn.Embedding",
)  # fmt: skip


@pytest.fixture(scope="module")
def tables() -> dict[str, Entry]:
    return {entry.name: entry for entry in entries()}


def test_a_fixed_part_of_the_tables(tables):
    known = report.listed(PAGE.read_text())
    new = []
    for name in FIXED:
        record = records.examine(tables[name], 1, rivals=False)
        assert record.outcomes, f"{name}: {record.note}"
        kinds = {o.kind for o in record.outcomes if o.verdict != "right"}
        if kinds - {kind for entry, kind in known if entry == name}:
            new += report.complaints(record)
    assert not new, "not right, and no exception of docs/coverage.md:\n" + "\n".join(new)


def test_the_page_has_every_entry_and_a_reason_for_every_exception(tables):
    page = PAGE.read_text()
    assert "unexplained" not in page
    missing = [name for name in tables if f"\n| `{name}` | " not in page]
    assert not missing, f"run `python -m tests.conformance --table docs/coverage.md`: {missing}"


# --- the runner -------------------------------------------------------------------------------


def _case(function, x, **more):
    return cases.Case("a case", function, x, **more)


def _batch(function, x=None):
    x = randn(4, 3) if x is None else x
    return _case(function, x, batched=True, others=x * 1.1 + 0.1)


@pytest.mark.usefixtures("rule_table")
def test_a_wrong_rule_is_reported():
    op = torch.ops.aten.sinh.default
    wrong = kinds.Elementwise(
        first=(lambda y, x: torch.ops.aten.cosh.default(x),), second={(0, 0): lambda y, x: y * 2}
    )
    fxhess.register_rule(replace(registry.find(op), kind=wrong), override=True)
    use = Use("3", randn(3), lambda x, lift: torch.sinh(x), embedded=False)
    record = records.examine(Entry("op", "sinh", lambda: iter([use])), 1, rivals=False)
    assert record.worst("unbatched").verdict == "wrong"
    assert record.worst("batched").verdict == "wrong"
    (line, *_) = report.complaints(record)
    assert line.startswith("op sinh [") and "off by" in line


def _ours(change):
    """fxhess's results, with something changed."""

    def run(case):
        hess = fxhess.transform(
            case.function, ("value", "gradient", "hessian"), event_ndim=case.event_ndim
        )
        value, gradient, hessian = hess(case.x)
        return change(value, gradient, hessian)

    return run


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("value off by", lambda v, g, h: (v + 1e-6, g, h)),
        ("gradient off by", lambda v, g, h: (v, g + 1e-6, h)),
        ("off by", lambda v, g, h: (v, g, h + 1e-6)),
        ("off by", lambda v, g, h: (v, g, h * float("nan"))),
        ("shape", lambda v, g, h: (v, g, h[..., 0])),
    ],
)
@pytest.mark.parametrize("batched", [False, True])
def test_a_small_error_is_reported(what, change, batched):
    case = _batch(lambda x: x.sin().prod(-1)) if batched else _case(torch.det, randn(3, 3))
    assert judge(case, None).verdict == "right"
    outcome = judge(case, None, _ours(change))
    assert outcome.verdict == "wrong"
    assert what in outcome.detail


MIXING = {
    "mean of the others": lambda x: (x - x.mean(0)).sin().sum(-1),
    "order of samples": lambda x: x.sum(-1) * x[:, 0].argsort().argsort(),
    "largest of all": lambda x: x.sin().sum(-1) * (x >= x.max()).any(-1),
    "square of the sum": lambda x: x.sum() ** 2,
    "largest": lambda x: x.max(),
    "cumulated": lambda x: x.cumsum(0).sum(-1),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_that_is_accepted_is_reported(name):
    case = _batch(MIXING[name])
    assert Referee(case).mixing

    def accept(case):
        n = case.x.shape[-1]
        return case.function(case.x), torch.zeros_like(case.x), case.x.new_zeros(len(case.x), n, n)

    outcome = judge(case, None, accept)
    assert (outcome.kind, outcome.verdict) == ("mixing", "wrong")


SEPARATE = {
    "rows": lambda x: x.sin().prod(-1),
    "a sum of samples": lambda x: x.prod(-1).sum(),
    "not finite": lambda x: (x - x).sqrt().sum(-1),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_independent_samples_are_known(name):
    assert not Referee(_batch(SEPARATE[name])).mixing


def test_a_refusal_of_independent_samples_is_reported():
    def refuse(case):
        raise fxhess.errors.SampleMixingError("no")

    outcome = judge(_batch(SEPARATE["rows"]), None, refuse)
    assert (outcome.kind, outcome.verdict) == ("batched", "refused")


class _Square(torch.autograd.Function):
    """Its backward is right, and not differentiable: double backward is wrong."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, g):
        return g * 3 * (ctx.saved_tensors[0] ** 2).detach()


def test_central_differences_decide():
    x = randn(3)
    case = _case(lambda x: _Square.apply(x).sum(), x)

    def right(case):
        return case.function(x), 3 * x**2, torch.diag(6 * x)

    assert judge(case, None, right).detail == CORRECTED
    outcome = judge(case, None, lambda case: (*right(case)[:2], torch.diag(5 * x)))
    assert outcome.verdict == "wrong"


def test_the_same_random_numbers_for_all():
    outcome = judge(_case(lambda x: F.dropout(x.sin(), 0.5).sum() ** 2, randn(8)), None)
    assert outcome.verdict == "right", outcome.detail


def test_results_are_brought_to_one_number_a_sample():
    x = randn(4, 3)
    results = (x.sin(), {"more": torch.complex(x, x)[:, 0]}, torch.arange(4))
    reduce = cases.Reduce(results, 4)
    assert reduce.rows and reduce(results).shape == (4,)
    alone = [reduce.of_one((r.sin(), {"more": torch.complex(r, r)[0]})) for r in x]
    torch.testing.assert_close(reduce(results), torch.stack(alone))
    assert cases.Reduce(x[0], 4).in_place
    with pytest.raises(cases.NoResultError):
        cases.Reduce(torch.arange(3))


def test_records_are_kept_and_read_again(tmp_path, tables):
    record = records.examine(tables["neg"], 1)
    assert record.rival("unbatched") == "right"
    path = tmp_path / "results.jsonl"
    records.keep(record, path)
    records.keep(replace(record, name="other", note="why", outcomes=()), path)
    assert records.load(path) == [record, replace(record, name="other", note="why", outcomes=())]


def test_the_page_lists_what_is_not_right():
    good = Outcome("unbatched", "3", "right", rival="fails")
    bad = Outcome("batched", "4×3", "wrong", "off by 1 | 2")
    page = report.page([records.Record("op", "f", (good, bad)), records.Record("op", "g", (good,))])
    assert ("f", "batched") in report.listed(page)
    assert not any(name == "g" for name, _ in report.listed(page))
    assert "| `f` | batched | wrong | unexplained: off by 1 \\| 2 [4×3] |" in page
    assert "| operators, unbatched | 2 | 2 | 0 | 0 | 0 | 0 | 2 |" in page
    assert "| `g` | ✓ | – | – | fails / – |" in page
