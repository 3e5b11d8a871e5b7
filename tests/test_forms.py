"""The forms that models come in: what they return and take, and what others made of them."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from reference import assert_close, check, mlp, randn
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxhess
from fxhess import CaptureError, InputError, oracle

X = randn(3, 4, seed=5)


def _net() -> nn.Sequential:
    return mlp(4, 3, 2)


@dataclass
class Result:
    shift: float
    energy: torch.Tensor


class Pair(NamedTuple):
    hidden: torch.Tensor
    energy: torch.Tensor


class Returning(nn.Module):
    """Its energy somewhere in a container."""

    def __init__(self, pack: Any) -> None:
        super().__init__()
        self.net = _net()
        self.pack = pack

    def forward(self, x: torch.Tensor, *, scale: float = 1.0, **extra: torch.Tensor) -> Any:
        y = self.net(x) * scale
        return self.pack(x, y + extra["bias"] if extra else y)


CONTAINERS = {  # name: how it is packed, what the error says to write, how it is picked
    "tuple": (lambda x, y: (y, x), "model(x)[0]", lambda r: r[0]),
    "list": (lambda x, y: [y, None], "model(x)[0]", lambda r: r[0]),
    "dictionary": (
        lambda x, y: {"energy": y, "x": x}, "model(x)['energy']", lambda r: r["energy"]
    ),
    "dictionary of one": (lambda x, y: {1: y}, "model(x)[1]", lambda r: r[1]),
    "dataclass": (lambda x, y: Result(0.5, y), "model(x).energy", lambda r: r.energy),
    "named tuple": (lambda x, y: Pair(x, y), "model(x).hidden", lambda r: r.energy),
    "nested": (lambda x, y: {"out": [Pair(x, y)]}, "model(x)['out']", lambda r: r["out"][0].energy),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_one_of_several_results(name):
    pack, said, pick = CONTAINERS[name]
    model = Returning(pack)
    with pytest.raises(CaptureError) as caught:
        fxhess.transform(model)(X)
    assert f"fxhess.transform(lambda x: {said})" in str(caught.value)
    hess = check(lambda x: pick(model(x)), X)
    with torch.no_grad():
        model.net[0].weight.mul_(1.5)  # the function's modules are live
    want = oracle.hessian(lambda x: pick(model(x)), X)
    assert_close(hess(X).hessian, want)


def test_model_output_of_transformers():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model = Returning(lambda x, y: outputs.BaseModelOutput(last_hidden_state=y))
    with pytest.raises(CaptureError, match=r"lambda x: model\(x\)\.last_hidden_state\)"):
        fxhess.transform(model)(X)
    check(lambda x: model(x).last_hidden_state, X)


def test_a_tuple_of_one_is_its_item():
    model = Returning(lambda x, y: (y,))
    assert torch.equal(fxhess.transform(model)(X), fxhess.transform(lambda x: model(x)[0])(X))


def test_keyword_arguments_stay_live():
    model = Returning(lambda x, y: y.exp())
    fixed = {"scale": 0.5, "bias": randn(2)}
    hess = check(lambda x: model(x, **fixed), X)
    fixed["bias"].add_(1.0)
    assert_close(hess(X).hessian, oracle.hessian(lambda x: model(x, **fixed), X))
    check(functools.partial(model, scale=0.3), X)


def test_hooks_take_part():
    model = _net()
    model[0].register_forward_hook(lambda module, args, result: result * 1.5)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 0.2,))
    model.register_forward_hook(lambda module, args, result: result.sin())
    check(model, X)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.net, self.reentrant = _net(), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return self.net(x).exp()
        return checkpoint(self.net, x, use_reentrant=self.reentrant).exp()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant):
    """Double backward itself cannot pass a reentrant checkpoint."""
    want = oracle.hessian(Checkpointed(None), X)
    assert_close(fxhess.transform(Checkpointed(reentrant))(X), want)


MADE = {
    "compiled": lambda net: torch.compile(net),
    "compiled inside": lambda net: nn.Sequential(torch.compile(net), nn.SiLU()),
    "compiled in place": lambda net: net.compile() or net,
    "compiled function": lambda net: torch.compile(lambda x: net(x).sin()),
    "traced by fx": torch.fx.symbolic_trace,
    "exported": lambda net: torch.export.export(
        net, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    ).module(),
    "bound method": lambda net: net.forward,
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize("name", MADE)
def test_made_of_a_module(name):
    model = MADE[name](_net())
    hess = check(model, X)
    hess.verify(X)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_refused(inside):
    model = torch.jit.trace(_net(), X)
    model = nn.Sequential(nn.Tanh(), model) if inside else model
    with pytest.raises(CaptureError, match=r"TorchScript[\s\S]*Python module"):
        fxhess.transform(model)(X)


def test_lazy_modules_are_initialized_first():
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(1)).double()
    hess = fxhess.transform(model)
    with pytest.raises(InputError, match=r"'0' is lazily[\s\S]*call model\(x\) once"):
        hess(X)
    model(X)
    assert_close(hess(X), oracle.hessian(model, X))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_in_single_precision(kind):
    """PyTorch runs them as one operation of oneDNN's, unlike those in double precision."""
    torch.manual_seed(0)
    layer = kind(2, 3, batch_first=True)
    x = randn(3, 3, 2, dtype=torch.float32)
    got = fxhess.transform(lambda x: layer(x)[0][:, -1].sum(1), event_ndim=2)(x)
    layer.double()
    want = oracle.hessian(lambda x: layer(x)[0][:, -1].sum(1), x.double(), 2)
    assert_close(got.double(), want, tolerance=1e-5)
