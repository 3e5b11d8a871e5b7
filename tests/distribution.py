"""Wheel and source distribution, checked, and the tests on other versions of Python and PyTorch.

``python -m tests.distribution`` (extra ``dist``) builds both of a copy of the checkout, checks them
with twine and check-wheel-contents, compares what is in them with what is tracked, and builds a
wheel of the source distribution again: it must be the same.

``python -m tests.distribution --torch 2.11.0 2.13.0 [--python python3.11 ..] [--index URL]`` makes
a fresh environment for each pair, installs that wheel in it and runs a selection of the tests there
(``--tests``), away from the checkout.  ``--index https://download.pytorch.org/whl/cpu`` has builds
without CUDA.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What an installed package needs of PyTorch: capture, rules, outputs, running, compile and export.
TESTS = (
    "tests/test_forms.py", "tests/test_outputs.py", "tests/test_module.py", "tests/test_passes.py",
    "tests/test_running.py", "tests/test_batch.py", "tests/test_explain.py",
)  # fmt: skip
_BUILT = re.compile(r"^(build|dist|__pycache__)$|\.egg-info$|\.pyc$|^\.\w+_cache$|^\.hypothesis$")
NEEDED = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "psutil")


def run(*command: object, cwd: Path = ROOT) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked() -> list[str]:
    """Files of the checkout: tracked ones, and new ones that are not ignored."""
    if (ROOT / ".git").exists():
        listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    else:  # a copy of the checkout: all that is no build's
        paths = (p.relative_to(ROOT) for p in ROOT.rglob("*"))
        listed = [str(p) for p in paths if not any(map(_BUILT.search, p.parts))]
    return sorted(name for name in listed if (ROOT / name).is_file())


def copy(target: Path) -> None:
    """The checkout without what builds leave beside it."""
    for name in tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def expected_in_wheel(names: Sequence[str]) -> set[str]:
    """Every file of the package, by its name in the wheel."""
    found = set()
    for name in names:
        top, _, rest = name.partition("/")
        if top == "fxhess":
            found.add(name)
        elif top in ("rules", "passes") and rest:
            found.add(f"fxhess/{name}")
    return found


def in_wheel(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {n: archive.read(n) for n in archive.namelist() if not n.endswith("/RECORD")}


def in_sdist(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        names = [m.name for m in archive.getmembers() if m.isfile()]
    return {name.partition("/")[2] for name in names}


def build(work: Path) -> Path:
    """Build and check both; the wheel."""
    source, dist, again = work / "checkout", work / "dist", work / "again"
    copy(source)
    print("==> build", flush=True)
    run(sys.executable, "-m", "build", "--outdir", dist, source)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    print("==> twine check", flush=True)
    print(run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist).strip())
    print("==> check-wheel-contents", flush=True)
    print(run(sys.executable, "-m", "check_wheel_contents", wheel).strip())
    names = tracked()
    held = in_wheel(wheel)
    package = {n for n in held if not n.partition("/")[0].endswith(".dist-info")}
    wanted = expected_in_wheel(names)
    if package != wanted:
        raise SystemExit(f"the wheel lacks {wanted - package} and has besides {package - wanted}")
    information = {n.partition("/")[2] for n in held if n not in package}
    if not {"METADATA", "entry_points.txt", "licenses/LICENSE"} <= information:
        raise SystemExit(f"the wheel's information is {information}")
    missing = {n for n in names if n not in in_sdist(sdist) and not n.startswith(".git")}
    if missing:
        raise SystemExit(f"the source distribution lacks {missing}")
    print("==> a wheel of the source distribution", flush=True)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", again, _unpacked(sdist, work))
    if in_wheel(next(again.glob("*.whl"))) != held:
        raise SystemExit("the wheel of the source distribution is another one")
    print(f"{wheel.name}: {len(package)} files; {sdist.name}: {len(in_sdist(sdist))} files")
    return wheel


def _unpacked(sdist: Path, work: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (folder,) = (work / "unpacked").iterdir()
    return folder


def test_on(
    work: Path, wheel: Path, python: str, torch: str, index: str | None, tests: Sequence[str]
) -> bool:
    """Run the selection in a fresh environment; whether all passed."""
    place = work / f"{Path(python).name}-torch-{torch}"
    environment = place / "environment"
    place.mkdir()
    run(python, "-m", "venv", environment)
    own = environment / "bin" / "python"
    print(f"==> {place.name}: install", flush=True)
    source = ["--index-url", index] if index else []
    try:
        run(own, "-m", "pip", "install", "--quiet", *source, f"torch=={torch}")
        run(own, "-m", "pip", "install", "--quiet", wheel, *NEEDED)
    except SystemExit as error:
        print(f"{place.name}: cannot be installed: {str(error).strip().splitlines()[-1]}")
        return False
    for name in tracked():  # the tests alone: the package is the installed one
        if name.startswith(("tests/", "pyproject.toml")):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    where = "import fxhess, torch; print(torch.__version__, fxhess.__file__)"
    print(run(own, "-c", where, cwd=place).strip(), flush=True)
    done = subprocess.run([str(own), "-m", "pytest", "-q", *tests], cwd=place)
    print(f"{place.name}: {'passed' if done.returncode == 0 else 'FAILED'}", flush=True)
    return done.returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.distribution", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--torch", nargs="*", default=[], help="versions to run the tests on")
    parser.add_argument("--python", nargs="*", default=[sys.executable], help="interpreters")
    parser.add_argument("--index", default=None, help="where PyTorch is installed from")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="what to run there")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wheel = build(work)
        results = [
            test_on(work, wheel, python, torch, arguments.index, arguments.tests)
            for python in arguments.python
            for torch in arguments.torch
        ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
