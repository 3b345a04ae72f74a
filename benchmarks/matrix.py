"""Tests of versions: an environment for each cell of a small matrix, a few tests in it, and a table of the results.

    python -m benchmarks.matrix                      every cell whose interpreter is here
    python -m benchmarks.matrix --only oldest        some of them; the others keep their last result
    python -m benchmarks.matrix --page               write the page anew from the results

    oldest    the oldest that pyproject.toml allows          3.11
    newest    the newest of the index, without our caps      3.13
    between   torch releases after which something changed   3.11, 3.12
    as set up the versions of constraints.txt                3.12; `make test` runs it under `make setup`'s

A cell takes some minutes and up to 8 GB of disk, which are given back. Interpreters are looked for on PATH, in /usr/bin
and where pyenv and uv keep theirs; Debian's own is taken before others of its version. A cell without one says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.reporting import RESULTS, machine

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/compatibility.md"
MARK = "<!-- written by benchmarks/matrix.py -->\n"
COMPANIONS = ("deepspeed", "transformers", "accelerate")
SHOWN = ("python", "torch", *COMPANIONS)
TIMEOUT_SECONDS = 3600

# A shipped run on two ranks, stopped after some steps, goes on to this one.
RUN = "configs/digits_autoencoder.yaml"
STEPS = (20, 30)

# The smallest loop, saving and resuming on one and two ranks, both engines of torch, and what needs names that torch
# keeps to itself: checkpointed activations, compiled models, views, tables of contents.
TORCH_TESTS = (
    "tests/test_readme.py::test_the_hand_written_loop_runs",
    "tests/test_readme.py::test_the_ddp_loop_runs_on_two_ranks",
    "tests/curvature/capture/test_checkpointing.py",
    "tests/curvature/test_compile.py::test_compiled_models_train_as_plain_ones",
    "tests/training/checkpoints/test_checkpoint.py",
    "tests/training/checkpoints/test_table.py",
    "tests/training/test_resume.py::test_a_resumed_run_is_the_same_run",
    "tests/training/test_resume.py::test_another_number_of_ranks_continues_the_run",
    "tests/engines/test_fsdp2.py::test_slices_are_views_of_what_the_optimizer_sees",
    "tests/engines/test_fsdp2.py::test_kfac_may_come_after_a_forward_pass",
    "tests/engines/test_fsdp2_state.py::test_a_resumed_run_has_the_same_bits",
)
COMPANION_TESTS = (
    "tests/engines/zero/test_engine.py::test_ranks_give_what_one_process_gives_wherever_gradients_are_cut",
    "tests/engines/zero/test_engine.py::test_an_overflow_leaves_statistics_inverses_and_parameters_alone",
    "tests/integrations/test_transformers.py",
    "tests/integrations/test_huggingface.py",
)


@dataclass(frozen=True)
class Cell:
    """Versions that are tried together.

    Attributes:
        name: Its name in the table.
        python: The interpreter's version, without the last number.
        torch: A release, or "oldest" or "newest".
        companions: "oldest" or "newest" of DeepSpeed, transformers and accelerate, or None: without them.
    """

    name: str
    python: str
    torch: str
    companions: str | None = None

    @property
    def tests(self) -> tuple[str, ...]:
        """The commands to run."""
        return TORCH_TESTS if self.companions is None else TORCH_TESTS + COMPANION_TESTS

    def requirements(self) -> list[str]:
        """Requirements for pip, besides the package itself."""
        wanted = [requirement("torch", self.torch)]
        if self.companions is not None:
            wanted += [requirement(package, self.companions) for package in COMPANIONS if package != "deepspeed"]
        return wanted


CELLS = (
    Cell("oldest", "3.11", "oldest", "oldest"),
    Cell("torch 2.7", "3.12", "2.7.1"),
    Cell("torch 2.11", "3.11", "2.11.0"),
    Cell("as set up", "3.12", "constraints", "constraints"),
    Cell("newest", "3.13", "newest", "newest"),
)


@dataclass
class Outcome:
    """Result of a cell.

    Attributes:
        cell: Its name.
        versions: Installed versions, by package.
        interpreter: Origin of the interpreter.
        root: Whether root ran it.
        state: "passed", "failed", "not installed" or "no interpreter".
        passed: Tests that passed.
        skipped: Tests that were skipped, and why.
        failed: Tests that failed, with the last line of their error.
        seconds: Time of the tests.
    """

    cell: str
    versions: dict[str, str]
    interpreter: str
    root: bool
    state: str
    passed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def requirement(package: str, release: str) -> str:
    """Return a requirement for pip: a release, the oldest that pyproject.toml allows, the newest, or that of
    set-ups."""
    if release == "newest":
        return package
    if release == "constraints":
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        return next(line for line in lines if line.startswith(f"{package}=="))
    return f"{package}=={oldest(package) if release == 'oldest' else release}"


def oldest(package: str) -> str:
    """Return the lower bound that pyproject.toml has for a package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *(need for extra in project["optional-dependencies"].values() for need in extra)]
    return next(match[1] for need in needs if (match := re.fullmatch(rf"{package}>=([0-9.]+).*", need)))


def interpreter(version: str) -> tuple[Path, str] | None:
    """Return an interpreter of a version and whose it is, Debian's before others."""
    home = Path.home()
    system = [("Debian's", Path("/usr/bin") / name) for name in (f"python{version}", "python3")]
    others = [("PATH's", Path(found)) for found in [shutil.which(f"python{version}")] if found]
    others += [("pyenv's", path) for path in sorted(home.glob(f".pyenv/versions/{version}.*/bin/python"), reverse=True)]
    others += [("uv's", path) for path in home.glob(f".local/share/uv/python/cpython-{version}.*/bin/python3")]
    for whose, path in [*system, *others]:
        if path.exists() and said(path, "import sys, venv; print('%d.%d' % sys.version_info[:2])") == version:
            return path, "the system's" if whose == "Debian's" else whose
    return None


def said(python: Path, program: str) -> str:
    ended = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return ended.stdout.strip() if ended.returncode == 0 else ""


def tried(cell: Cell, environments: Path | None) -> Outcome:
    """Build a cell's environment, run its tests, and remove it unless it has a place to stay."""
    found = interpreter(cell.python)
    root = os.geteuid() == 0
    if found is None:
        return Outcome(cell.name, {"python": cell.python}, "", root, "no interpreter")
    python, whose = found
    with tempfile.TemporaryDirectory(prefix="matrix-") as temporary:
        place = (environments or Path(temporary)) / cell.name.replace(" ", "-")
        log = Path(temporary) / "log"
        try:
            install(cell, python, place, log)
        except subprocess.CalledProcessError:
            lines = log.read_text().strip().splitlines()
            version = said(python, "import platform; print(platform.python_version())")
            return Outcome(
                cell.name, {"python": version}, whose, root, "not installed", failed={"pip": lines[-1] if lines else ""}
            )
        report = Path(temporary) / "report.xml"
        start = time.monotonic()
        outcome = Outcome(cell.name, installed(place / "bin/python"), whose, root, "failed")
        if (reached := shipped_run(place / "bin/python", Path(temporary), log)) == STEPS[-1]:
            outcome.passed += 1
        else:
            outcome.failed[RUN] = f"two ranks came to step {reached} of {STEPS[-1]}"
        run_tests(place / "bin/python", cell.tests, report, log)
        outcome.seconds = round(time.monotonic() - start, 1)
        if report.exists():
            count(report, outcome)
        else:
            outcome.failed["pytest"] = log.read_text().strip().splitlines()[-1]
    return outcome


def install(cell: Cell, python: Path, place: Path, log: Path) -> None:
    """Make an environment and install into it; installed packages are left.

    Raises:
        CalledProcessError: A step failed; the log says why.
    """
    pip = [str(place / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    steps = [] if (place / "bin/python").exists() else [[str(python), "-m", "venv", str(place)]]
    # With torch first: DeepSpeed's build asks for it.
    steps.append(
        [*pip, *cell.requirements(), "pytest", "pytest-timeout", "setuptools", "wheel", "ninja", f"{ROOT}[train]"]
    )
    if cell.companions is not None:
        steps.append([*pip, "--no-build-isolation", requirement("deepspeed", cell.companions)])
    with log.open("w") as output:
        for step in steps:
            environment = {**os.environ, "DS_BUILD_OPS": "0"}
            subprocess.run(step, env=environment, stdout=output, stderr=subprocess.STDOUT, check=True)


def surroundings(python: Path) -> dict[str, str]:
    """Return the variables of commands in an environment: the tree comes before the installed package."""
    # Installed commands are the environment's.
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": path,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(ROOT),
    }


def shipped_run(python: Path, directory: Path, log: Path) -> int:
    """Train a shipped run on two ranks, and once more from its checkpoint; return the step that it reached."""
    launch = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kfac_dist"]
    with log.open("a") as output:
        for steps in STEPS:
            told = [f"run.directory={directory}", "run.name=matrix", f"train.steps={steps}", "run.device=cpu"]
            command = [*launch, "train", RUN, *told, "--resume", "auto", "--quiet"]
            subprocess.run(
                command, cwd=ROOT, env=surroundings(python), stdout=output, stderr=output, timeout=600, check=False
            )
    metrics = directory / "matrix/metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((int(json.loads(line).get("step", 0)) for line in lines), default=0)


def run_tests(python: Path, tests: Sequence[str], report: Path, log: Path) -> None:
    """Run tests of the tree."""
    command = [
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "timeout=1500",
        f"--junitxml={report}",
        *tests,
    ]
    with log.open("a") as output:
        subprocess.run(
            command,
            cwd=ROOT,
            env=surroundings(python),
            stdout=output,
            stderr=output,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )


def installed(python: Path) -> dict[str, str]:
    """Return versions by package, of installed ones."""
    program = (
        "import importlib.metadata as m, json, platform\n"
        "found = {'python': platform.python_version()}\n"
        f"for name in {('torch', 'numpy', *COMPANIONS)!r}:\n"
        "    try:\n        found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError:\n        pass\n"
        "print(json.dumps(found))"
    )
    found: dict[str, str] = json.loads(said(python, program))
    return found


def count(report: Path, outcome: Outcome) -> None:
    """Add the results of a report of pytest's."""
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            outcome.failed[name] = (bad.get("message") or "").strip().partition("\n")[0][:200]
        elif (skipped := case.find("skipped")) is not None:
            why = skipped.get("message") or ""
            outcome.skipped[why] = outcome.skipped.get(why, 0) + 1
        else:
            outcome.passed += 1
    outcome.state = "failed" if outcome.failed or not outcome.passed else "passed"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the page's table, a row for each cell."""
    rows = [
        "| | Python | torch | DeepSpeed | transformers | Accelerate | tests | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        versions = [result["versions"].get(name, "") for name in SHOWN]
        whose = ", ".join([result["interpreter"]] if result["interpreter"] else [])
        versions[0] += f" ({whose}{'' if result['root'] else ', not root'})" if whose else ""
        tests = f"{result['passed']} passed"
        if result["failed"]:
            tests += f", {len(result['failed'])} failed"
        if result["skipped"]:
            tests += f", {sum(result['skipped'].values())} skipped"
        rows.append(f"| {result['cell']} | {' | '.join(versions)} | {tests} | {result['state']} |")
    return "\n".join([*rows, ""])


def failures(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line of the page for each failure."""
    for result in results:
        for name, why in result["failed"].items():
            yield f"- {result['cell']}: `{name.removeprefix('tests.')}`: {why.replace('|', '/')}"


def write_page(results: Sequence[dict[str, Any]]) -> str:
    """Return the page with the table of these results in it."""
    head, _, rest = PAGE.read_text().partition(MARK)
    tail = rest.partition(MARK)[2]
    lines = list(failures(results))
    return head + MARK + table(results) + ("\n" + "\n".join(lines) + "\n" if lines else "") + MARK + tail


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", choices=[cell.name for cell in CELLS], help="a cell; may be repeated"
    )
    parser.add_argument("--environments", type=Path, help="keep the environments here, and use those that are there")
    parser.add_argument("--out", type=Path, default=RESULTS / "matrix.json")
    parser.add_argument("--page", action="store_true", help="write the page from the results, and run nothing")
    options = parser.parse_args()
    before = json.loads(options.out.read_text())["results"] if options.out.exists() else []
    results = {result["cell"]: result for result in before}
    for cell in () if options.page else CELLS:
        if options.only and cell.name not in options.only:
            continue
        print(f"{cell.name}: Python {cell.python}, {', '.join(cell.requirements())} …", flush=True)
        outcome = tried(cell, options.environments)
        results[cell.name] = asdict(outcome)
        print(f"{cell.name}: {outcome.state}, {outcome.passed} passed in {outcome.seconds:g} s", flush=True)
        for name, why in outcome.failed.items():
            print(f"  {name}: {why}", flush=True)
        ordered = [results[cell.name] for cell in CELLS if cell.name in results]
        report = {"benchmark": "matrix", "machine": machine(), "settings": {"user": "named in each row"}}
        options.out.write_text(json.dumps(report | {"results": ordered}, indent=2) + "\n")
    if options.out == RESULTS / "matrix.json":
        PAGE.write_text(write_page([results[cell.name] for cell in CELLS if cell.name in results]))


if __name__ == "__main__":
    main()
