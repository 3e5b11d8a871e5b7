"""Programs as plain data and back: the same to the bit, and nothing in a file is ever executed."""

from __future__ import annotations

import json
import math
import operator

import pytest
import torch
import zoo
from torch import nn

import fxhess
from fxhess import naming, pipeline, serial

_SOME = [(family, case) for family, case in zoo.table() if family != "hugging_face"][::14]


@pytest.mark.parametrize("family,case", _SOME, ids=lambda c: getattr(c, "name", c))
def test_programs_of_the_zoo_come_back(family, case):
    """As text and back: the same code, explanation and results."""
    x = case.draw()
    hess = fxhess.transform(case.model(), ("gradient", "hessian"), event_ndim=len(case.event))
    try:
        program = hess._found(hess.prepared((x,), {})).program
        text = serial.dumps(program)
    except serial.NotPlainError as error:
        pytest.skip(f"stays in memory: {error}")
    back = serial.loads(text)
    assert back.graph_module.code == program.graph_module.code
    assert back.graph_module.print_readable(
        print_output=False
    ) == program.graph_module.print_readable(print_output=False)
    assert serial.dumps(back) == text
    tensors = list(hess.tensors(x).values())
    pairs = [(program.graph_module, back.graph_module), (program.fused, back.fused)]
    runs = [lambda m=m: m(x, *tensors) for pair in pairs for m in pair]
    if program.execution is not None:
        runs += [lambda p=p: p.execution(x, tensors) for p in (program, back)]
    for ours, theirs in zip(runs[::2], runs[1::2], strict=True):
        with torch.no_grad():
            torch.manual_seed(3)
            want = ours()
            torch.manual_seed(3)
            assert all(map(torch.equal, theirs(), want))


def test_all_that_a_program_may_hold_comes_back_bit_for_bit():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    values = (
        None, True, 1, -(2**70), -0.0, 0.1, math.inf, -math.inf, math.nan, 1e-320, "a'\"\n",
        complex(-0.0, math.inf), [1, [x]], (x, ()), slice(None, 3, x), ..., torch.float16,
        torch.strided, torch.channels_last, torch.device("cuda:1"), torch.Size([2, 3]),
        {"b": 1, "a": [x]},
    )  # fmt: skip
    node = graph.call_function(operator.add, values, {"alpha": 2})
    graph.output(node)
    program = _program(graph)
    back = serial.loads(serial.dumps(program))
    assert back.graph_module.code == program.graph_module.code
    found = next(n for n in back.graph_module.graph.nodes if n.op == "call_function").args
    for ours, theirs in zip(node.args, found, strict=True):
        assert type(ours) is type(theirs)
        assert repr(ours) == repr(theirs)


def _program(graph):
    module = torch.fx.GraphModule(nn.Module(), graph)
    return pipeline.Program(module, [], False, False, ["x"], math.inf, 1)


# --- nothing is executed ------------------------------------------------------------------------

FORBIDDEN = [
    "torch.load", "torch.save", "torch.from_file", "torch.compile", "torch.hub", "torch.os",
    "torch.sys.exit", "aten::from_file.default", "aten::save.default", "aten::copy_.default",
    "aten::_print.default", "aten::__getitem__.str", "operator.methodcaller",
    "operator.attrgetter", "operator.itemgetter", "operator.call", "operator.setitem",
    "builtins.exec", "builtins.eval", "os.system", "fxhess.triangle.torch",
    "fxhess.naming.function_of", "fxhess::function.default", "fxhess::derivatives.default",
    "torch.nn.functional.handle_torch_function", "torch.__builtins__", "torch..matmul", "",
    "torch.fft.torch", "torch.ops.load_library", "torch.classes", "aten::__class__.default",
]  # fmt: skip


@pytest.mark.parametrize("name", FORBIDDEN)
def test_no_file_names_what_is_not_a_function_of_tensors(name):
    with pytest.raises(naming.UnknownNameError):
        naming.function_of(name)


@pytest.mark.parametrize(
    "name", ["apply_", "numpy", "tolist", "__class__", "__reduce_ex__", "register_hook", "data",
             "tofile", "storage", "copy_", "backward", "__init__", "share_memory_", "a b", ""],
)  # fmt: skip
def test_no_file_calls_other_methods(name):
    assert not naming.is_method(name)


SOUND = {
    "functions": ["operator.mul"], "stand-ins": [["torch.float64", [509, 3], [3, 1]]],
    "origins": [None],
    "nodes": [
        ["placeholder", "x", None, [], {}, {"v": 0}, 0, "value", True],
        ["call_function", "H", 0, [{"n": 0}, 2], {}, {"v": 0}, 0, "result", True],
        ["output", "output", None, [{"n": 1}], {}, None, 0, None, None],
    ],
    "fields": json.loads(serial.dumps(_program((lambda g: (g.output(g.placeholder("x")), g)[1])(
        torch.fx.Graph()))))["fields"],
}  # fmt: skip
CODE = "__import__('os').abort()"


def _with(change):
    document = json.loads(json.dumps(SOUND))
    change(document)
    return json.dumps(document)


BAD = {
    "a value's name is code": lambda d: d["nodes"][1].__setitem__(1, f"a = {CODE} #"),
    "an input's name is code": lambda d: d["nodes"][0].__setitem__(1, f"x, a={CODE}"),
    "a keyword argument is code": lambda d: d["nodes"][1].__setitem__(4, {f"a={CODE}, b": 1}),
    "a name is a keyword": lambda d: d["nodes"][1].__setitem__(1, "class"),
    "a name looks like another": lambda d: d["nodes"][1].__setitem__(1, "ｅval"),
    "a name with a line": lambda d: d["nodes"][1].__setitem__(1, f"H\n{CODE}"),
    "two of a name": lambda d: d["nodes"][1].__setitem__(1, "x"),
    "a function": lambda d: d["functions"].__setitem__(0, "torch.load"),
    "a submodule": lambda d: d["nodes"][1].__setitem__(0, "call_module"),
    "an attribute": lambda d: d["nodes"][1].__setitem__(0, "get_attr"),
    "a method": lambda d: d["nodes"][1].__setitem__(slice(0, 3), ["call_method", "H", "numpy"]),
    "a value of later": lambda d: d["nodes"][1].__setitem__(3, [{"n": 1}, 2]),
    "a value of before": lambda d: d["nodes"][1].__setitem__(3, [{"n": -1}, 2]),
    "an unknown tag": lambda d: d["nodes"][1].__setitem__(3, [{"exec": CODE}, 2]),
    "two tags": lambda d: d["nodes"][1].__setitem__(3, [{"n": 0, "t": []}, 2]),
    "a dtype": lambda d: d["stand-ins"].__setitem__(0, ["torch.load", [1], [1]]),
    "too large": lambda d: d["stand-ins"].__setitem__(0, ["torch.float64", [-1], [1]]),
    "no output": lambda d: d["nodes"].pop(),
    "a late input": lambda d: d["nodes"].insert(1, d["nodes"].pop(0)),
    "fields": lambda d: d["fields"].update(graph_module=1),
    "no fields": lambda d: d["fields"].pop("notes"),
    "nothing": lambda d: d.clear(),
}


@pytest.mark.parametrize("what", BAD)
def test_documents_that_are_refused(what):
    assert serial.loads(json.dumps(SOUND)).graph_module(torch.ones(2))[0] == 2
    with pytest.raises(serial.NotPlainError):
        serial.loads(_with(BAD[what]))


@pytest.mark.parametrize("text", ["", "[", "null", "[]", "1e999", '{"nodes":[]}', "[" * 100_000])
def test_texts_that_are_refused(text):
    with pytest.raises(serial.NotPlainError):
        serial.loads(text)
