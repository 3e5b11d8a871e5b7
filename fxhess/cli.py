"""The commands ``explain``, ``verify``, ``bench``, ``calibrate`` and ``cache``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.text import Text
from torch import nn

from fxhess import cache, named, store, terminal
from fxhess.api import transform
from fxhess.calibrate import calibrate
from fxhess.compared import compare
from fxhess.module import HessianModule
from fxhess.named import UsageError
from fxhess.units import duration, si
from fxhess.verify import VerificationError

WRONG, USAGE, REFUSED = 1, 2, 3

_MODEL = """
A model is named as package.module:factory or path/file.py:factory. The factory is an nn.Module, or
is called without arguments and returns one; a function that takes x is itself the model.
"""


def add_model(parser: argparse.ArgumentParser) -> None:
    """What says which model, and which inputs."""
    parser.add_argument("model", help="package.module:factory or file.py:factory")
    parser.add_argument(
        "--shape", type=named.shape, required=True, metavar="B,D", help="of x, as in 500,200"
    )
    parser.add_argument("--event-ndim", type=int, default=1, metavar="N",
                        help="how many trailing axes of x are one sample (default 1)")  # fmt: skip
    parser.add_argument("--dtype", type=named.dtype, default=torch.float32,
                        help="float32 (default), float64, float16 or bfloat16")  # fmt: skip
    parser.add_argument("--device", type=named.device, default=torch.device("cpu"),
                        help="cpu (default), cuda, ...")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the random x (default 0)")
    parser.add_argument("--eval", action="store_true", help="put the model into evaluation mode")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``transform``."""
    parser.add_argument("--strategy", choices=("auto", "close", "pull", "rebase"), default="auto")
    parser.add_argument("--compile", action="store_true", help="run tiles through torch.compile")
    parser.add_argument("--max-memory", type=named.size, default=None, metavar="SIZE",
                        help="what a call may allocate, as in 64M")  # fmt: skip


def model_and_x(arguments: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    """What the arguments name: the model as it is asked for, weights frozen, and a random x."""
    if not 0 <= arguments.event_ndim <= len(arguments.shape):
        raise UsageError(
            f"--event-ndim {arguments.event_ndim} does not fit --shape"
            f" {','.join(map(str, arguments.shape))}"
        )
    torch.manual_seed(arguments.seed)
    model = named.find_model(arguments.model)
    if isinstance(model, nn.Module):
        model = model.to(arguments.device, arguments.dtype).requires_grad_(False)
        if arguments.eval:
            model.eval()
    generator = torch.Generator().manual_seed(arguments.seed)
    x = torch.randn(arguments.shape, generator=generator)
    return model, x.to(arguments.device, arguments.dtype)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "strategy": arguments.strategy,
        "compile": arguments.compile,
        "max_memory": arguments.max_memory,
    }


def _transformed(arguments: argparse.Namespace, model: Any, outputs: Any) -> HessianModule:
    return transform(model, outputs, event_ndim=arguments.event_ndim, **_options(arguments))


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on standard output; numbers that JSON has not become null."""
    print(json.dumps(_plain(document), indent=1))  # ASCII, whatever the locale


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _wrong(arguments: argparse.Namespace, error: VerificationError) -> int:
    if arguments.json:
        print_json({"passed": False, "message": str(error)})
    else:
        terminal.console().print(Text(str(error), "red"))
    return WRONG


# --- explain --------------------------------------------------------------------------------------


def add_explain(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_options(parser)
    parser.add_argument("--outputs", type=named.outputs, default="hessian", metavar="NAMES",
                        help="as in hessian (default) or value,gradient,laplacian")  # fmt: skip
    parser.add_argument("--html", metavar="FILE", help="write a page with a picture of the plan")
    parser.add_argument("--all", action="store_true", help="every operation, term and product")
    parser.add_argument("--code", action="store_true", help="print the generated code only")


def run_explain(arguments: argparse.Namespace) -> int:
    model, x = model_and_x(arguments)
    hess = _transformed(arguments, model, arguments.outputs)
    if arguments.code:
        print(hess.graph_module(x).code.strip())
        return 0
    explanation = hess.explain(x)
    if arguments.html:
        try:
            explanation.write_html(arguments.html)
        except OSError as error:
            raise UsageError(f"--html {arguments.html}: {error.strerror or error}") from None
    if arguments.json:
        print_json(_plain(explanation))
        return 0
    out = terminal.console()
    terminal.show_explanation(out, explanation, arguments.all)
    if arguments.html:
        out.print(Text(f"written: {arguments.html}"))
    return 0


# --- verify ---------------------------------------------------------------------------------------


def add_verify(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_options(parser)
    parser.add_argument("--samples", type=int, default=8, help="how many are compared (default 8)")


def run_verify(arguments: argparse.Namespace) -> int:
    if arguments.samples < 1:
        raise UsageError("--samples has to be positive")
    model, x = model_and_x(arguments)
    try:
        found = _transformed(arguments, model, "hessian").verify(x, samples=arguments.samples)
    except VerificationError as error:
        return _wrong(arguments, error)
    if arguments.json:
        print_json({"passed": True, **_plain(found)})
    else:
        terminal.console().print(Text(str(found), "green"))
    return 0


# --- bench ----------------------------------------------------------------------------------------


def add_bench(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_options(parser)
    parser.add_argument("--seconds", type=float, default=5.0, help="to measure for (default 5)")
    parser.add_argument("--at-least", type=float, default=None, metavar="TIMES",
                        help="fail unless fxhess is so many times faster than others")  # fmt: skip


def run_bench(arguments: argparse.Namespace) -> int:
    if not arguments.seconds > 0:
        raise UsageError("--seconds has to be positive")
    model, x = model_and_x(arguments)
    try:
        found = compare(model, x, arguments.event_ndim, arguments.seconds, **_options(arguments))
    except VerificationError as error:
        return _wrong(arguments, error)
    least = arguments.at_least
    enough = least is None or (found.speedup is not None and found.speedup >= least)
    if arguments.json:
        print_json({"passed": enough, **_plain(found)})
        return 0 if enough else WRONG
    out = terminal.console()
    threads = torch.get_num_threads()
    where = f"{arguments.device}, {threads} threads" if x.device.type == "cpu" else str(x.device)
    shape = "×".join(map(str, x.shape))
    out.print(
        Text(f"{arguments.model}, x: {shape} {x.dtype}, {where}, PyTorch {torch.__version__}")
    )
    terminal.show_comparison(out, found)
    if not enough:
        told = "no other way ran" if found.speedup is None else f"{found.speedup:.2f} times"
        out.print(Text(f"too slow: {told}, at least {least:g} asked for", "red"))
    return 0 if enough else WRONG


# --- calibrate ------------------------------------------------------------------------------------


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=named.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", type=named.dtype, default=torch.float32)
    parser.add_argument("--seconds", type=float, default=3.0, help="to measure for (default 3)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run_calibrate(arguments: argparse.Namespace) -> int:
    rates = calibrate(arguments.device, arguments.dtype, seconds=arguments.seconds)
    if arguments.json:
        print_json(_plain(rates))
        return 0
    rows: list[tuple[str, str]] = []
    for field in dataclasses.fields(rates):
        value = getattr(rates, field.name)
        if field.name in ("flat", "batched"):
            rows += [(f"{field.name} products, side {side:.0f}", f"{si(rate)}FLOP/s")
                     for side, rate in value]  # fmt: skip
        elif field.name == "launch":
            rows.append(("an operation at least", duration(value)))
        else:
            unit = {"convolution": "FLOP/s", "transposed": "FLOP/s"}.get(field.name, "B/s")
            unit = "/s" if field.name in ("gather", "special") else unit
            rows.append((field.name, f"{si(value)}{unit}"))
    out = terminal.console()
    out.print(terminal.table(("rate", "*measured"), rows))
    folder = store.folder()
    out.print(Text(f"kept in {folder}" if folder else "not kept: FXHESS_CACHE=0"))
    return 0


# --- cache ----------------------------------------------------------------------------------------


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("info", "clear"))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run_cache(arguments: argparse.Namespace) -> int:
    before = cache.cache_info().disk
    if arguments.action == "clear":
        cache.cache_clear(disk=True)
    disk = cache.cache_info().disk
    removed = before.entries - disk.entries
    status = WRONG if arguments.action == "clear" and disk.entries else 0
    if arguments.json:
        folder = None if disk.path is None else str(disk.path)
        print_json({**disk._asdict(), "path": folder, "removed": removed})
        return status
    out = terminal.console()
    if arguments.action == "clear":
        out.print(
            Text(f"{removed} programs removed" + (f", {disk.entries} left" if status else ""))
        )
        return status
    rows = [
        ("folder", str(disk.path) if disk.path else "none: turned off, or not ours alone"),
        ("programs", f"{disk.entries:,}"),
        ("size", f"{si(disk.bytes)}B of at most {si(disk.maxbytes)}B"),
    ]
    out.print(terminal.table(("cache", ""), rows))
    return status


# Name: summary, what it adds to the parser, how it runs, and what --help says at its end.
COMMANDS: dict[str, tuple[str, Callable[..., None], Callable[..., int], str]] = {
    "explain": (
        "show what became of a model: every operation, how its terms end, what they cost",
        add_explain,
        run_explain,
        _MODEL
        + """
examples:
  fxhess explain torchvision.models:resnet18 --shape 2,3,64,64 --event-ndim 3 --eval
  fxhess explain model.py:Net --shape 500,200 --html plan.html
  fxhess explain model.py:energy --shape 64,10,3 --event-ndim 2 --outputs value,laplacian --json
""",
    ),
    "verify": (
        "compare a model's Hessians with double backward in float64, and check symmetry",
        add_verify,
        run_verify,
        _MODEL
        + """
examples:
  fxhess verify package.module:make_model --shape 32,10
  fxhess verify model.py:Net --shape 8,20 --dtype float64 --samples 4 --json
""",
    ),
    "bench": (
        "time a model's Hessians beside vmap(hessian) and vmap(jacrev(jacrev)), values checked",
        add_bench,
        run_bench,
        _MODEL
        + """
Weights are frozen for all ways alike; rounds are interleaved, medians told.

examples:
  fxhess bench model.py:Net --shape 500,200
  fxhess bench model.py:Net --shape 500,200 --at-least 2 || echo "slower than it was"
""",
    ),
    "calibrate": (
        "measure this machine's rates, which plans are chosen by, and keep them",
        add_calibrate,
        run_calibrate,
        """
The machine should be otherwise idle. FXHESS_CACHE_DIR names another folder than the user's cache.

examples:
  fxhess calibrate
  fxhess calibrate --dtype float64 --seconds 10
""",
    ),
    "cache": (
        "say what is kept between processes and where, or remove it",
        add_cache,
        run_cache,
        """
examples:
  fxhess cache info
  fxhess cache clear
  FXHESS_CACHE_DIR=/scratch/plans fxhess cache info --json
""",
    ),
}
