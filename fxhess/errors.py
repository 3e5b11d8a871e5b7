"""Every error that fxhess raises on purpose: what went wrong, where, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Origin:
    """Where a captured operation comes from, for messages and for comments in generated code.

    ``op`` is the operator's name (``aten.tanh.default``), ``module`` the dotted path of the
    module that called it (empty for a plain function), ``line`` the user's own source line.
    ``step`` is the same for all that became of one operation of the model: the position of its
    first node in the captured graph; x has 0.
    """

    op: str
    module: str = ""
    line: str = ""
    step: int = field(default=-1, compare=False, repr=False)

    def __str__(self) -> str:
        parts = [f"op {self.op}"]
        if self.module:
            parts.append(f"in module '{self.module}'")
        if self.line:
            parts.append(f"at {self.line}")
        return ", ".join(parts)

    @property
    def stack_trace(self) -> str:
        """The line as PyTorch notes it on nodes."""
        file, _, rest = self.line.partition(":")
        number, _, code = rest.partition(": ")
        return f'  File "{file}", line {number}, in forward\n    {code}\n'


class FxhessError(Exception):
    """Base of all errors of this package.

    The message has up to three parts: what is wrong, where (operation, module path, the user's
    own line) and what to do next.
    """

    def __init__(self, what: str, *, where: Origin | str | None = None, hint: str = "") -> None:
        self.what = what
        self.where = where
        self.hint = hint
        text = what
        if where is not None and str(where):
            text += f"\n  where: {where}"
        if hint:
            text += f"\n  next:  {hint}"
        super().__init__(text)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.hint)


def _rebuild(
    cls: type[FxhessError], what: str, where: Origin | str | None, hint: str
) -> FxhessError:
    return cls(what, where=where, hint=hint)


class InputError(FxhessError, ValueError):
    """The call's tensors do not fit: rank, shape, dtype, device, ``out``."""


class CaptureError(FxhessError):
    """PyTorch could not trace the model, or the model branches on the values of tensors."""


class SampleMixingError(FxhessError):
    """The model lets the samples of a batch see each other, so no per-sample Hessian exists."""


class SampleStructureError(FxhessError):
    """What a model does depends on the values of x, and so may differ between the samples of a
    batch.  Raised and caught inside: each sample is then captured in a batch of its own."""


class UnsupportedOpError(FxhessError, NotImplementedError):
    """An operation that the samples flow through has no second-derivative rule."""


class FileError(FxhessError, ValueError):
    """A file that holds no saved module: another kind of file, a part of one, changed, or of a
    newer version; or a module that cannot be saved."""


class RuleError(FxhessError):
    """A rule is registered twice, is malformed, or was found to be wrong by the checker."""


class InternalError(FxhessError):
    """A graph broke its own invariants after a pass: a bug in fxhess, please report it."""


class StructureWarning(UserWarning):
    """A model is captured again and again since its structure depends on values."""
