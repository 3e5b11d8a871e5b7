"""The benchmark suite's own arithmetic, its files, and what it does with rivals that fail.

Needs the extra ``bench``; JAX's twins are checked against the models where JAX is there.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

psutil = pytest.importorskip("psutil", reason="the extra `bench` is not installed")

from benchmarks import (  # noqa: E402
    growth,
    outputs,
    processes,
    record,
    report,
    worker,
    workloads,
)
from benchmarks.measure import TOLERANCES, Result  # noqa: E402
from benchmarks.rivals import RIVALS  # noqa: E402

EVERY = {w.name: w for w in (*workloads.WORKLOADS, *growth.GROWTH)}


def _result(rival, seconds, **more):
    times = [] if seconds is None else [seconds] * 3
    return Result(rival, **{"error": 1e-6, "tolerance": 1e-3, "times": times, **more})


def _run(name, *found, speed=None):
    return record.Run.of(EVERY[name], found, speed)


ROWS = [
    _run(
        "headline",
        _result("fxhess", 0.1, peak=100 << 20, written=80_000_000, arithmetic=20_000_000_000),
        _result("fxhess compiled", 0.05, peak=90 << 20),
        _result("JAX jit", 0.4, peak=200 << 20),
        _result("gradient sum", 0.01, error=0.5),  # fast and wrong
        speed=record.Speed(product=4e11, write=2e10),
    ),
    _run(
        "pinn-f64",
        _result("fxhess", 0.2, peak=3 << 20),
        _result("fxhess compiled", None, failure="RuntimeError: no"),
        _result("JAX jit", 0.1, peak=1 << 20),
    ),
]


def test_only_right_values_and_other_projects_are_rivals():
    assert [run.best_rival.rival for run in ROWS] == ["JAX jit", "JAX jit"]
    assert [run.lead() for run in ROWS] == [pytest.approx(4.0), pytest.approx(0.5)]
    assert ROWS[1].lead("fxhess compiled") is None
    wrong = _run("small", _result("fxhess", 0.1, error=math.nan), _result("JAX jit", 0.1))
    assert wrong.lead() is None and record.summary([wrong]) is None


def test_the_summary_is_a_geometric_mean_and_the_worst_row():
    found = record.summary(ROWS)
    assert found.mean == pytest.approx(math.sqrt(2.0))
    assert (found.smallest, found.smallest_row) == (pytest.approx(0.5), "pinn-f64")
    assert (found.counted, found.rows, found.leaner, found.weighed) == (2, 2, 1, 2)
    assert record.summary(ROWS, "fxhess compiled").counted == 1


def test_the_limit_is_arithmetic_and_writing():
    assert ROWS[0].limit == pytest.approx(20e9 / 4e11 + 80e6 / 2e10)
    assert ROWS[0].over_limit == pytest.approx(0.1 / 0.054)
    assert ROWS[1].limit is None


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "cpu.json"
    document = record.write_json(
        path, ROWS, {}, command="python -m benchmarks", device="cpu", calibrated=False, others=0.0
    )
    assert record.read_json(path) == json.loads(json.dumps(document))
    assert record.runs_of(record.read_json(path)) == [
        record.Run(**{**vars(run), "results": list(run.results)}) for run in ROWS
    ]
    text = report.markdown(document, record.runs_of(document))
    header, _, first, second = (line for line in text.splitlines() if line.startswith("|"))
    assert header.count("|") == first.count("|") == second.count("|")
    assert "**100** (100)" in first and "400, 4× (200)" in first and "wrong" in first
    assert "54, 1.9×" in first
    assert "float64" in second and "fails" in second
    assert "1.4× over 2 of 2 rows" in text and "RuntimeError: no" in text


@pytest.mark.parametrize("name", ["small", "columns", "quadratic", "vector", "encoder", "single"])
def test_a_workloads_batch_fits_its_model(name):
    workload = EVERY[name]
    x = workload.make_x(0, "cpu")
    y = workload.make_model("cpu")(x)
    batch = len(x)
    assert y.shape in ((), (batch,), (batch, 1), (batch, workload.outputs))
    assert torch.equal(x, workload.make_x(0, "cpu")) and not torch.equal(
        x, workload.make_x(1, "cpu")
    )


def test_every_type_has_a_tolerance_and_every_name_is_once():
    assert {w.dtype for w in EVERY.values()} <= set(TOLERANCES)
    assert len(EVERY) == len(workloads.WORKLOADS) + len(growth.GROWTH)
    assert len({r.name for r in RIVALS}) == len(RIVALS)
    for workload in growth.GROWTH:
        axis, size = growth.size_of(workload.name)
        assert axis in growth.AXES and size >= 1
        if axis in ("batch", "inputs"):
            assert workload.shape[("batch", "inputs").index(axis)] == size


def _job(**changes):
    return worker.Job(
        **{"workload": "small", "rivals": ("fxhess",), "device": "cpu", "budget": 0.01,
           "memory": False, **changes}
    )  # fmt: skip


def test_a_rival_that_takes_too_long_is_stopped_and_the_others_run(monkeypatch):
    monkeypatch.setattr(worker, "events_of", _slow_rival)
    found = worker.run_job(_job(rivals=("fxhess", "JAX jit"), limit=5.0), lambda *_: None)
    assert [r.rival for r in found] == ["fxhess", "JAX jit"]
    assert found[1].failure == "stopped after 5 s" and found[0].failure is None


def _slow_rival(job):
    yield {"stage": "first call", "rival": "fxhess"}
    if "JAX jit" in job.rivals:
        yield {"stage": "first call", "rival": "JAX jit"}
        yield {"late": job.limit}
    else:
        yield {"results": [{"rival": "fxhess", "times": [0.1]}]}


def test_a_process_that_shows_nothing_is_ended():
    """A real one: with next to no patience, the first rival's first call is too long."""
    (found,) = worker.run_job(_job(limit=0.001), lambda *_: None)
    assert found.failure == "stopped after 0.001 s" and not found.times


@pytest.mark.parametrize("name", ["small", "columns", "vector", "encoder", "attention", "deep-set",
                                  "pairwise", "glm", "cnn"])  # fmt: skip
def test_twins_are_the_models(name):
    jax = pytest.importorskip("jax")
    from benchmarks import twins

    workload = EVERY[name]
    model, x = workload.make_model("cpu"), workload.make_x(0, "cpu")[:3]
    weights = {k: v.numpy() for k, v in model.state_dict().items()}
    got = jax.vmap(twins.twin_of(model), in_axes=(None, 0))(weights, x.numpy())
    torch.testing.assert_close(
        torch.tensor(got.tolist()).reshape(-1), model(x).reshape(-1), rtol=1e-4, atol=1e-5
    )


def test_the_table_of_processes_tells_how_much_faster_a_later_one_is():
    run = {"import": 1.0, "first": 6.0, "second": 0.1, "sum": "0x1p0"}
    found = {"off": [run], "first": [run], "later": [{**run, "first": 1.0}] * 3}
    text = processes.table(found)
    assert "6.0 times faster" in text and "with `import fxhess`, 3.5 times" in text
    assert "| later process | 1.00 | 1.00 | 0.100 |" in text


def test_outputs_are_measured_and_held_to_what_they_promise():
    small = workloads.Workload("small", "", lambda: torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)), (5, 3))  # fmt: skip
    rows = outputs.measure(small, 1, with_folx=False)
    names = ["gradient", "hessian", "laplacian", "diagonal", "hvp", "quadratic"]
    assert [r.output for r in rows] == [*names, "laplacian compiled"]
    assert all(r.time > 0 and r.error < 1e-4 and r.hessian == 5 * 9 * 4 for r in rows)
    table = outputs.table(rows)
    assert table[0][3] == "1" and all(len(line) == len(outputs.HEAD) for line in table)
    made = {name: outputs.Row("w", name, [1.0], peak=1, hessian=100 << 20) for name in names}
    assert outputs.broken(list(made.values())) == []
    made["hvp"].times, made["diagonal"].peak = [5.1], 100 << 20
    assert outputs.broken(list(made.values())) == [
        "w, diagonal: 100 MB, as much as H", "w, hvp: 5.1 gradients",
    ]  # fmt: skip
