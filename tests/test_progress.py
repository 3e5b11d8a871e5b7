"""Long calls: a bar that moves with the tiles, and Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from reference import mlp, randn

import fxhess
from fxhess import progress

ROOT = Path(__file__).resolve().parent.parent


class Bar:
    """Stands in for tqdm's."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, total, **options):
        self.total, self.n, self.steps, self.closed = total, 0, [], False
        Bar.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def update(self, n):
        self.n += n
        self.steps.append(n)


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    Bar.made = []
    return Bar.made


def test_the_bar_moves_with_the_tiles(bars, monkeypatch):
    hess = fxhess.transform(mlp(30, 40, 1))
    x = randn(12000, 30)
    with torch.no_grad():
        H = hess(x, progress=True)
        assert torch.equal(H, hess(x))
    (bar,) = bars
    monkeypatch.setattr("fxhess.explain._MEASURING", 0.0)
    tiles = hess.explain(x).tiles
    assert tiles > 2 and len(bar.steps) == tiles + 1  # the last one fills what is left: nothing
    assert bar.n == bar.total == 12000 and bar.closed and bar.steps[-1] == 0
    assert progress._bar.get() is None


def test_the_bar_counts_all_batch_axes(bars):
    hess = fxhess.transform(mlp(30, 40, 1))
    with torch.no_grad():
        hess(randn(3000, 4, 30), progress=True)
    (bar,) = bars
    assert bar.n == bar.total == 12000 and len(bar.steps) > 3


def test_small_calls_and_calls_with_gradients_fill_it_at_once(bars):
    hess = fxhess.transform(mlp(3, 4, 1).requires_grad_(True))
    for x in (randn(5, 3), randn(3), randn(0, 3)):
        assert torch.equal(hess(x, progress=True), hess(x))
    assert [(bar.n, bar.total) for bar in bars] == [(5, 5), (1, 1), (0, 0)]


def test_the_bar_moves_row_by_row(bars):
    model, x = mlp(200, 8, 1), randn(2, 200)
    H = torch.empty(2, 200, 200, dtype=torch.float64)
    with torch.no_grad():
        hess = fxhess.transform(model, max_memory=(6 << 20) + 200_000)
        hess(x, out=H, progress=True)
        assert torch.allclose(H, fxhess.transform(model)(x), atol=1e-12)
    (bar,) = bars
    assert len(bar.steps) > 6 and 0 < bar.steps[0] < 0.4 and abs(bar.n - 2) < 1e-9


def test_an_error_closes_the_bar(bars):
    hess = fxhess.transform(mlp(3, 4, 1))
    with pytest.raises(fxhess.InputError):
        hess(torch.zeros(2, 3, dtype=torch.long), progress=True)
    assert bars[0].closed and progress._bar.get() is None


# Calls again and again until it is interrupted, three times, and tells each time whether all is as
# it was; the fourth interrupt is nobody's.
INTERRUPTED = """
import torch, fxhess
from torch import nn

fxhess.progress._DELAY = 0
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
model = model.requires_grad_(False)
hess = fxhess.transform(model)
x = torch.randn(5000, 40)
out = torch.empty(len(x), 40, 40)
hess(x[:100])
hess(x, progress=True)

def right():
    H = hess(x)
    want = torch.func.vmap(torch.func.hessian(lambda s: model(s)[0]))(x[:8])
    parts = torch.cat([hess(x[:500]), hess(x[500:900])])
    return (torch.allclose(H[:8], want, atol=1e-5) and torch.allclose(H[:900], parts, atol=1e-5)
            and not H.isnan().any().item() and hess.verify(x[:4]).symmetric)

for i in range(3):
    print("calling", flush=True)
    try:
        while True:
            hess(x, out=out, progress=i % 2 == 0)
            model[0].weight.mul_(1.01)  # what is kept of weights is made anew
    except KeyboardInterrupt:
        print("interrupted", right(), flush=True)
print("calling", flush=True)
while True:
    hess(x)
"""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.skipif(os.name == "nt", reason="signals of a POSIX system")
def test_ctrl_c_stops_a_call_and_leaves_the_module_right():
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            for wait in (0.0, 0.03, 0.31):
                assert process.stdout.readline() == "calling\n"
                time.sleep(wait)
                process.send_signal(signal.SIGINT)
                assert process.stdout.readline() == "interrupted True\n"
            assert process.stdout.readline() == "calling\n"
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in err
    assert re.search(r"fxhess: +\d+%.*sample/s", err)  # the bar
