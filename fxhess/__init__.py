"""fxhess: exact per-sample Hessians of PyTorch modules, by compiling the derivative.

``hess = fxhess.transform(model)`` returns a module; ``hess(x)`` is ``[B, d, d]`` for ``x: [B, d]``.
"""

from __future__ import annotations

import importlib.metadata
import os

# In a checkout's root Python finds this folder before an installed package; its subpackages then
# stand beside it.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_root, "rules", "elementwise.py")) and os.path.isfile(
    os.path.join(_root, "pyproject.toml")
):
    __path__.append(_root)

from fxhess import kinds, testing  # noqa: E402
from fxhess.api import transform  # noqa: E402
from fxhess.cache import CacheInfo, cache_clear, cache_info  # noqa: E402
from fxhess.calibrate import calibrate  # noqa: E402
from fxhess.errors import (  # noqa: E402
    CaptureError,
    FileError,
    FxhessError,
    InputError,
    InternalError,
    RuleError,
    SampleMixingError,
    StructureWarning,
    UnsupportedOpError,
)
from fxhess.module import HessianModule  # noqa: E402
from fxhess.rates import Rates  # noqa: E402
from fxhess.registry import Rule, register_rule  # noqa: E402
from fxhess.saved import SavedModule, load, package, save  # noqa: E402
from fxhess.verify import VerificationError  # noqa: E402
from fxhess.wrt import parameters  # noqa: E402

try:
    __version__ = importlib.metadata.version("fxhess")
except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "CacheInfo",
    "CaptureError",
    "FileError",
    "FxhessError",
    "HessianModule",
    "InputError",
    "InternalError",
    "Rates",
    "Rule",
    "RuleError",
    "SampleMixingError",
    "SavedModule",
    "StructureWarning",
    "UnsupportedOpError",
    "VerificationError",
    "__version__",
    "cache_clear",
    "cache_info",
    "calibrate",
    "kinds",
    "load",
    "package",
    "parameters",
    "register_rule",
    "save",
    "testing",
    "transform",
]
