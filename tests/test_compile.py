"""Under PyTorch's own compilers, ``torch.compile`` and ``torch.export``; and the generated code."""

from __future__ import annotations

import operator
import re

import pytest
import torch
from reference import ALL, assert_close, mlp, randn
from torch import fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxhess
from fxhess import oracle


def _conv():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.SiLU(), nn.Flatten(), nn.LayerNorm(9), nn.Linear(9, 2)
    ).double()


def _closure():
    w = randn(4, 4, seed=2)
    return lambda x: torch.tanh(x @ w).square().sum(-1)


MODELS = {  # name: model, event shape
    "mlp": (mlp(4, 5, 1), (4,)),
    "vector": (mlp(4, 5, 2, activation=nn.Softplus), (4,)),
    "convolution": (_conv(), (2, 4)),
    "function": (_closure(), (4,)),
    "affine": (nn.Linear(4, 1).double(), (4,)),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _hess(name, outputs="hessian"):
    model, event = MODELS[name]
    hess = fxhess.transform(model, outputs, event_ndim=len(event))
    hess.specialize(randn(2, *event))
    return hess, event


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", MODELS)
def test_one_compilation_serves_every_batch_size(name, grad):
    hess, event = _hess(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(hess, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(grad):
        for size in (5, 7, 3, 12):
            x = randn(size, *event, seed=size)
            torch._dynamo.mark_dynamic(x, 0)
            assert_close(compiled(x).detach(), hess(x).detach(), 1e-12)
    assert counter.frame_count == 1


def test_several_outputs_compile():
    hess, event = _hess("mlp", ALL)
    compiled = torch.compile(hess, fullgraph=True, dynamic=True, backend="aot_eager")
    x = randn(3, *event)
    for got, want in zip(compiled(x), hess(x), strict=True):
        assert_close(got.detach(), want.detach(), 1e-12)


def test_inductor():
    hess, event = _hess("mlp")
    x = randn(5, *event)
    with torch.no_grad():
        compiled = torch.compile(hess, fullgraph=True, dynamic=True)
        assert_close(compiled(x), hess(x), 1e-12)


def test_gradients_through_a_compiled_hessian():
    hess, event = _hess("mlp")
    x = randn(3, *event).requires_grad_()
    parameters = [x, *hess.parameters()]
    compiled = torch.compile(hess, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), parameters, allow_unused=True)
    want = torch.autograd.grad(hess(x).square().sum(), parameters, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            assert_close(g, w, 1e-12)


def test_weights_stay_live_in_compiled_code():
    model = mlp(4, 5, 1)
    hess = fxhess.transform(model, example=randn(2, 4))
    compiled = torch.compile(hess, fullgraph=True, backend="aot_eager")
    x = randn(3, 4)
    compiled(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert_close(compiled(x).detach(), oracle.hessian(model, x))


def test_compiling_what_is_not_specialized_says_so():
    hess = fxhess.transform(mlp(4, 5, 1))
    compiled = torch.compile(hess, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"before torch\.compile"):
        compiled(randn(3, 4))
    free = torch.compile(hess, backend="eager")  # outside of the graph, if it may
    x = randn(3, 4)
    assert_close(free(x).detach(), oracle.hessian(hess.model, x))


def test_exporting_what_is_not_specialized_makes_its_program():
    """Without Dynamo the trace runs this module's own Python: the program is made beside it."""
    hess = fxhess.transform(mlp(4, 5, 1))
    x = randn(3, 4)
    exported = torch.export.export(
        hess, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    for batch in (3, 7):
        x = randn(batch, 4, seed=batch)
        assert_close(exported.module()(x).detach(), oracle.hessian(hess.model, x))
    with pytest.raises(Exception, match=r"before torch\.compile or torch\.export"):
        torch.export.export(fxhess.transform(hess.model), (x,), strict=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_export_with_dynamic_batch(name, strict):
    hess, event = _hess(name)
    exported = torch.export.export(
        hess, (randn(4, *event),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict
    )
    module = exported.module()
    for size in (2, 5):
        x = randn(size, *event, seed=size)
        assert_close(module(x).detach(), hess(x).detach(), 1e-12)


def test_exported_program_is_saved_and_loaded(tmp_path):
    hess, event = _hess("mlp")
    x = randn(4, *event)
    program = torch.export.export(
        hess, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    torch.export.save(program, tmp_path / "hess.pt2")
    loaded = torch.export.load(tmp_path / "hess.pt2").module()
    assert_close(loaded(x).detach(), hess(x).detach(), 1e-12)


# --- the generated code -------------------------------------------------------------------------

FORBIDDEN = re.compile(r"autograd|backward|vmap|functorch|jvp|vjp|jacobian|higher_order")


@pytest.mark.parametrize("name", MODELS)
def test_generated_code_is_plain_operations(name):
    hess, event = _hess(name, ALL)
    module = hess.graph_module(randn(2, *event))
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.nodes:
        assert node.op in ("placeholder", "call_function", "call_method", "output")
        if node.op == "call_function":
            origin = getattr(node.target, "__module__", "") or ""
            plain = isinstance(node.target, torch._ops.OpOverload) or node.target.__name__ in dir(
                operator
            )
            assert plain or origin.startswith(("torch", "_operator", "builtins")), node.target
            assert not origin.startswith(("torch.autograd", "torch._functorch", "torch.func"))
        assert not FORBIDDEN.search(str(node.target))
    module.graph.lint()


@pytest.mark.parametrize("name", MODELS)
def test_generated_code_is_readable(name):
    hess, event = _hess(name, ALL)
    module = hess.graph_module(randn(2, *event))
    names = [node.name for node in module.graph.nodes]
    assert names[0] == "x" and {"H", "g", "value"} & set(names)
    assert not [n for n in names if re.match(r"arg\d|primals|_tensor_constant|tangents_", n)]
    assert all(len(line) < 400 for line in module.code.splitlines())
    if name == "mlp":
        assert {"p_0_weight", "p_2_bias"} <= set(names)
    if name == "function":
        text = module.print_readable(print_output=False)
        assert "v_tanh" in text and "test_compile.py" in text and "torch.tanh(x @ w)" in text


def test_generated_module_runs_on_its_own():
    hess, event = _hess("mlp")
    x = randn(3, *event)
    module = hess.graph_module(x)
    tensors = hess.tensors(x)
    assert list(tensors) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert_close(module(x, *tensors.values()).detach(), hess(x).detach(), 1e-13)


def test_no_python_branching_on_tensors():
    """The same nodes run whatever the values are: tracing with other data gives the same code."""
    hess, event = _hess("mlp")
    x = randn(3, *event)
    code = hess.graph_module(x).code
    traced = torch.fx.experimental.proxy_tensor.make_fx(hess.graph_module(x))
    first = traced(x, *hess.tensors(x).values()).code
    second = traced(1e3 * x, *hess.tensors(x).values()).code
    assert first == second and code == hess.graph_module(1e3 * x).code
