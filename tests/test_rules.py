"""Every rule, on the samples of tests/samples: data drives one test."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reference import randn
from torch.utils._python_dispatch import TorchDispatchMode

from fxhess import registry
from fxhess._settings import plain_attention
from fxhess.capture import capture
from fxhess.closures import as_module
from fxhess.kinds import Composite, Elementwise
from fxhess.testing import Sample, check_sample

FILES = sorted((Path(__file__).parent / "samples").glob("[!_]*.py"))

# Rules that no sample can use, each with its reason.
NO_REFEREE = "PyTorch has no double backward; in test_pointwise.py"
KERNEL = "seen on other devices or in other builds; in test_kernels.py"
EXPORT = "make_fx shows it in parts; torch.export, the fallback, whole"
TRACED = "a constant made in forward, in a trace: test_module.py, test_batch.py"
WITHOUT_SAMPLE: dict[str, str] = {
    "aten.hardsigmoid.default": NO_REFEREE,
    "aten.multi_margin_loss.default": NO_REFEREE,
    "aten.remainder.Scalar_Tensor": NO_REFEREE,
    "aten.special_zeta.other_scalar": NO_REFEREE,
    "aten.lift_fresh_copy.default": TRACED,
    "aten.binary_cross_entropy_with_logits.default": EXPORT,
    "aten.rrelu_with_noise_functional.default": EXPORT,
    "aten._convolution.default": KERNEL,
    "aten.convolution_overrideable.default": KERNEL,
    "aten.mkldnn_convolution.default": KERNEL,
    "aten.cudnn_convolution.default": KERNEL,
    "aten._fused_rms_norm.default": KERNEL,
    "aten.cudnn_batch_norm.default": KERNEL,
    "aten.miopen_batch_norm.default": KERNEL,
    "aten.mkldnn_max_pool2d.default": KERNEL,
    "aten.mkldnn_max_pool3d.default": KERNEL,
    "aten._thnn_fused_lstm_cell.default": KERNEL,
    "aten._thnn_fused_gru_cell.default": KERNEL,
}


def _samples(path: Path) -> list[Sample]:
    spec = importlib.util.spec_from_file_location(f"samples_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SAMPLES


TABLE = [(path.stem, sample) for path in FILES for sample in _samples(path)]


def _identifier(family: str, sample: Sample) -> str:
    return f"{family}-{re.sub('[^A-Za-z0-9_.=,+-]+', '_', sample.name)}"


IDS = [_identifier(family, sample) for family, sample in TABLE]


def _turns() -> Iterator[tuple[int, Sample]]:
    """How many samples of the same operator, the first word of their names, come before each."""
    before: Counter[tuple[str, str]] = Counter()
    for family, sample in TABLE:
        operator = (family, re.split("[ ,]", sample.name)[0])
        yield before[operator], sample
        before[operator] += 1


MANY = 3  # samples of one operator that the suite itself runs


@pytest.mark.parametrize(
    ("turn", "sample"),
    [
        pytest.param(turn, sample, id=identifier, marks=[pytest.mark.slow] * (turn >= MANY))
        for (turn, sample), identifier in zip(_turns(), IDS, strict=True)
    ],
)
def test_sample(turn, sample):
    """In one of two models in turn, first in that which finds all mistakes (test_checker.py)."""
    check_sample(sample, seed=1, turn=turn)


@pytest.mark.slow
@pytest.mark.parametrize("sample", [s for _, s in TABLE], ids=IDS)
def test_sample_in_every_model(sample):
    """At another point; `test_sample` remains in the suite."""
    check_sample(sample, seed=2)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_names_of_samples_are_unique(path):
    names = [s.name for family, s in TABLE if family == path.stem]
    assert names and len(names) == len(set(names))


BY_RESULT = [
    pytest.param(rule.op, rule.kind, id=str(rule.op))
    for rule in registry.rules()
    if isinstance(rule.kind, Elementwise) and rule.kind.by_result
]


@pytest.mark.parametrize(("op", "kind"), BY_RESULT)
def test_second_forms_by_the_result_are_those_by_the_operands(op, kind):
    """d2y = sum_ij second_ij dx_i dx_j = sum_i by_result_i (dx_i dy + dy dx_i)."""
    x = [1.5 + randn(8, seed=i) ** 2 for i in range(len(kind.first))]
    y = op(*x)

    def at(partial):
        return partial(y, *x) if callable(partial) else torch.full_like(y, partial)

    first = [at(f) for f in kind.first]
    by_result = [at(kind.by_result.get(i, 0)) for i in range(len(x))]
    for j in range(len(x)):
        for i in range(j + 1):
            want = by_result[i] * first[j] + by_result[j] * first[i]
            torch.testing.assert_close(at(kind.second.get((i, j), 0)), want)


class _Recorder(TorchDispatchMode):
    """Runs a model as capture does, rewrites included, but on plain tensors: far cheaper."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[object] = set()
        self.rewrites = registry.decompositions()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.used.add(func)
        if func in self.rewrites:
            with self:
                result = self.rewrites[func](*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))


def _ran(sample: Sample) -> set[object]:
    """The operators that a sample runs."""
    recorder = _Recorder()
    with recorder, plain_attention():
        torch.func.functionalize(sample.function)(sample.draw(0))
    return recorder.used


def _captured(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> set[object]:
    """The operators in a sample's captured graph, and those rewritten on the way there."""
    used: set[object] = set()

    def recorded(op, rewrite):
        def record(*args, **kwargs):
            used.add(op)
            return rewrite(*args, **kwargs)

        return record

    table = {op: recorded(op, rewrite) for op, rewrite in registry.decompositions().items()}
    monkeypatch.setattr(registry, "decompositions", lambda: table)
    nb = 0 if sample.batch is None else 1
    graph = capture(as_module(sample.function), sample.draw(0), nb).graph_module.graph
    monkeypatch.undo()
    return used | {node.target for node in graph.nodes if node.op == "call_function"}


def test_every_rule_has_a_sample(monkeypatch):
    unused = {rule.op for rule in registry.rules()}
    for _, sample in TABLE:
        unused -= _ran(sample)
    for _, sample in TABLE:  # what only tracing shows
        if not {str(op) for op in unused} - set(WITHOUT_SAMPLE):
            break
        unused -= _captured(sample, monkeypatch)
    names = {str(op) for op in unused}
    missing = sorted(names - set(WITHOUT_SAMPLE))
    assert not missing, f"{len(missing)} rules without a sample: {', '.join(missing)}"
    needless = sorted(set(WITHOUT_SAMPLE) - names)
    assert not needless, f"these have a sample, or no rule: {', '.join(needless)}"


@pytest.mark.parametrize("rule", list(registry.rules()), ids=lambda rule: str(rule.op))
def test_a_rule_fits_its_operator(rule):
    """What a rule names is in the operator's schema."""
    arguments = {a.name: str(a.type) for a in rule.op._schema.arguments}
    named = [*rule.differentiable, *getattr(rule.axes, "aligned", ())]
    named += [n for n in (getattr(rule.axes, "dim", ""), getattr(rule.axes, "of", "")) if n]
    if not isinstance(rule.kind, Composite):
        assert set(named) <= set(arguments)
    for name in rule.differentiable:
        assert "Tensor" in arguments[name]
    if rule.output is not None:
        assert 0 <= rule.output < len(rule.op._schema.returns)


def test_samples_draw_float64():
    assert all(s.draw(0).dtype == torch.float64 for _, s in TABLE)
    assert all(s.draw(0).shape == s.shape for _, s in TABLE)
