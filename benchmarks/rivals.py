"""The rivals: each way to get ``[B, (m,) *event, *event]``. A new one is a line in ``RIVALS``."""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap

import fxhess
from benchmarks.workloads import Workload

__all__ = ["OURS", "RIVALS", "STRATEGIES", "Problem", "Rival", "Runner"]

OURS = "fxhess"


@dataclass(frozen=True)
class Problem:
    """A workload on a device, with the model's function of one sample."""

    workload: Workload
    model: nn.Module
    device: str

    def sample_function(self) -> Callable[[Tensor], Tensor]:
        """``f: [*event] -> []``, or ``[m]`` where the model has m outputs."""
        batches_only, outputs = self.workload.batches_only, self.workload.outputs

        def f(sample: Tensor) -> Tensor:
            y = self.model(sample.unsqueeze(0) if batches_only else sample)
            return y.reshape((outputs,) if outputs > 1 else ())

        return f

    def double(self) -> "Problem":
        """The same in float64 on the CPU, for reference values."""
        return Problem(self.workload, copy.deepcopy(self.model).cpu().double(), "cpu")


@dataclass(frozen=True)
class Runner:
    """A rival made ready for one problem.

    ``prepare`` brings a PyTorch batch into the rival's own form, which is not timed; ``call`` is
    timed, and returns only when the result is there or leaves that to PyTorch's synchronization.
    ``explain`` tells our own plan for a batch; ``stated`` what a library says itself that a call
    allocates, in bytes, where it keeps memory that the system then does not see it take.
    """

    prepare: Callable[[Tensor], Any]
    call: Callable[[Any], Any]
    to_torch: Callable[[Any], Tensor]
    explain: Callable[[Tensor], Any] | None = None
    stated: Callable[[Any], int] | None = None


@dataclass(frozen=True)
class Rival:
    """A name and how to make it ready; not every rival is in the default set."""

    name: str
    summary: str
    build: Callable[[Problem], Runner]
    default: bool = True
    own_allocator: bool = False  # device memory that PyTorch does not see


def same(value: Any) -> Any:
    """Nothing to convert."""
    return value


def in_torch(call: Callable[[Tensor], Tensor]) -> Runner:
    """A runner that takes and gives PyTorch tensors."""
    return Runner(same, call, same)


def transformed(problem: Problem, **options: Any) -> fxhess.HessianModule:
    """``fxhess.transform`` as a user calls it."""
    return fxhess.transform(problem.model, event_ndim=problem.workload.event_ndim, **options)


def ours(problem: Problem) -> Runner:
    """Our module, called."""
    hess = transformed(problem)
    return Runner(same, hess, same, hess.explain)


def ours_into(problem: Problem) -> Runner:
    """The same, each call writing into one kept result."""
    hess = transformed(problem)
    kept: list[Tensor] = []

    def call(x: Tensor) -> Tensor:
        if not kept:
            kept.append(torch.empty_like(hess(x)))
        return hess(x, out=kept[0])

    return in_torch(call)


def ours_compiled(problem: Problem) -> Runner:
    """The same, compiled by itself."""
    return in_torch(transformed(problem, compile=True))


def ours_within(problem: Problem) -> Runner:
    """``torch.compile`` over our module, as part of a larger program would be."""
    hess = transformed(problem)
    hess.specialize(problem.workload.make_x(0, problem.device))
    return in_torch(torch.compile(hess))


def forced(strategy: str) -> Callable[[Problem], Runner]:
    """All terms end in one way."""
    return lambda problem: in_torch(transformed(problem, strategy=strategy))


def vmap_hessian(problem: Problem) -> Runner:
    """``torch.func``'s forward-over-reverse."""
    return in_torch(vmap(hessian(problem.sample_function())))


def vmap_hessian_compiled(problem: Problem) -> Runner:
    """The same through Inductor."""
    return in_torch(torch.compile(vmap(hessian(problem.sample_function()))))


def jacrev_compiled(problem: Problem) -> Runner:
    """Reverse over reverse through Inductor."""
    return in_torch(torch.compile(vmap(jacrev(jacrev(problem.sample_function())))))


def gradient_sum(problem: Problem) -> Runner:
    """The trick of the forums: the Jacobian of the gradient summed over the batch.

    Samples do not see each other, so that sum's Jacobian in ``x_b`` is ``H_b``.
    """
    model, workload = problem.model, problem.workload
    m = workload.outputs

    def summed_gradient(x: Tensor) -> Tensor:
        y = model(x)
        columns = y.reshape(-1, m).unbind(-1)  # the whole batch's sum is a legal output, too
        gradients = [torch.autograd.grad(c.sum(), x, create_graph=True)[0].sum(0) for c in columns]
        return torch.stack(gradients) if m > 1 else gradients[0]  # [(m,) *event]

    def call(x: Tensor) -> Tensor:
        rows = torch.autograd.functional.jacobian(summed_gradient, x, vectorize=True)
        return rows.movedim(-x.ndim, 0)  # [(m,) *event, B, *event] with B brought to the front

    return in_torch(call)


def jax_hessian(problem: Problem) -> Runner:
    """``jit(vmap(hessian))`` of the model's twin, weights passed in at each call."""
    # Imported here, so that a machine without JAX records that and runs the others.
    jax = importlib.import_module("jax")
    twins = importlib.import_module("benchmarks.twins")
    jax.config.update("jax_default_matmul_precision", "highest")  # as PyTorch: no TF32
    # Of this process, which measures one workload only.
    jax.config.update("jax_enable_x64", problem.workload.dtype == torch.float64)
    platform = "gpu" if problem.device.startswith("cuda") else "cpu"
    device = jax.devices(platform)[0]
    f = twins.twin_of(problem.model)

    def prepare(tensor: Tensor) -> Any:
        return jax.device_put(tensor.detach().cpu().numpy(), device)

    weights = {name: prepare(tensor) for name, tensor in problem.model.state_dict().items()}
    batched = jax.jit(jax.vmap(jax.hessian(f, argnums=1), in_axes=(None, 0)))

    def to_torch(H: Any) -> Tensor:
        return torch.utils.dlpack.from_dlpack(jax.device_put(H, jax.devices("cpu")[0]))

    def stated(x: Any) -> int:
        statistics = batched.lower(weights, x).compile().memory_analysis()
        return int(statistics.temp_size_in_bytes + statistics.output_size_in_bytes)

    def call(x: Any) -> Any:
        return batched(weights, x).block_until_ready()

    return Runner(prepare, call, to_torch, stated=stated)


STRATEGIES = ("close", "pull", "rebase")

RIVALS = [
    Rival(OURS, "fxhess.transform(model)", ours),
    Rival("fxhess out=", "the same, writing into one result", ours_into),
    Rival("fxhess compiled", "fxhess.transform(model, compile=True)", ours_compiled),
    Rival("fxhess within", "torch.compile of the module", ours_within, default=False),
    *(
        Rival(f"fxhess {name}", f"with strategy={name!r}", forced(name), default=False)
        for name in STRATEGIES
    ),
    Rival("vmap(hessian)", "torch.func, eager", vmap_hessian),
    Rival("compiled hessian", "torch.compile(vmap(hessian))", vmap_hessian_compiled),
    Rival("compiled jacrev²", "torch.compile(vmap(jacrev(jacrev)))", jacrev_compiled),
    Rival("gradient sum", "jacobian(vectorize=True) of the summed gradient", gradient_sum),
    Rival("JAX jit", "jax.jit(jax.vmap(jax.hessian))", jax_hessian, own_allocator=True),
]
