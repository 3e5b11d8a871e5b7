import os as _os
_root = _os.path.dirname(_os.path.dirname(__file__))
if _os.path.isdir(_os.path.join(_root, "rules")):
    __path__.append(_root)
