"""The long battery of faults and load: ``python -m tests.faults``, ten times what the suite does of
each (``--times 3``: three times)."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

FILES = (
    "test_faults.py",
    "test_folder.py",
    "test_load.py",
    "test_interrupts.py",
    "test_disk.py",
    "test_saved.py",
    "test_exported.py",
    "test_cache.py",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--times", type=float, default=10.0, help="how often (default: 10)")
    times = parser.parse_args().times
    here = Path(__file__).resolve().parent
    return subprocess.call(
        [
            sys.executable, "-m", "pytest", "-n", "1", "--timeout", "1800", "--durations", "15",
            *(str(here / name) for name in FILES),
        ],
        cwd=here.parent,
        env={**os.environ, "FXHESS_FAULTS": str(times)},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
