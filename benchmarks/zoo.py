"""The zoo: every family of transformers (and some of timm) that can be built small, through `doctor` and K-FAC's steps.

Each family runs in processes of its own with a time limit, so that none ends the run: what `doctor` finds, two steps in
training mode, and five on one rank and on two with the same global batches, whose parameters must agree. Where they
don't, the same steps without K-FAC say whether the model itself couples the samples of a batch. Families that are in
the result file already are not run again; the page is written from the file.

    python -m benchmarks.zoo [--families NAME …] [--tasks causal …] [--again] [--limit SECONDS] [--out FILE]
    python -m benchmarks.zoo --page            # docs/zoo.md from the file, nothing else
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.reporting import RESULTS, write
from benchmarks.zoo_page import PAGE, page

AGREE = 1e-4
"""Parameters of two ranks are those of one if no tensor differs by more, relative to its largest value."""


def run(name: str, limit: float) -> dict[str, Any]:
    """Return everything about one family that JSON can hold."""
    from benchmarks.zoo_family import difference, examined, stepped

    began = time.time()
    [alone] = _ranks(examined, [(name,)], limit)
    if "failed" in alone:
        return {"outcome": alone["kind"], "message": alone["failed"], "seconds": round(time.time() - began, 1)}
    found = {key: value for key, value in alone.items() if key != "state"}
    with tempfile.TemporaryDirectory() as directory:
        for with_kfac in (True, False):
            meeting = f"{directory}/{with_kfac}"
            ranks = _ranks(stepped, [(name, meeting, rank, 2, with_kfac) for rank in range(2)], limit)
            failed = [rank for rank in ranks if "failed" in rank]
            if failed:
                first = min(failed, key=lambda rank: rank["at"])
                outcome = "failed on two ranks"
                if with_kfac:
                    alike = _ranks(stepped, [(name, f"{meeting}-alike", rank, 2, False) for rank in range(2)], limit)
                    if any("failed" in rank for rank in alike):
                        outcome = "trained on one rank, and not by DDP, which fails without K-FAC, too"
                return {**found, "outcome": outcome, "message": first["failed"]}
            if with_kfac:
                wanted = alone["state"]
            else:
                [plain] = _ranks(stepped, [(name, "", 0, 1, False)], limit)
                wanted = plain["state"]
            worst, where = max((difference(rank["state"], wanted) for rank in ranks), key=lambda pair: _order(pair[0]))
            found["agreement" if with_kfac else "agreement without K-FAC"] = worst
            found["least equal" if with_kfac else "least equal without K-FAC"] = where
            if worst < AGREE:
                break
    found["outcome"] = "trained"
    found["seconds"] = round(time.time() - began, 1)
    return found


def _order(error: float) -> float:
    return error if error == error else float("inf")


def _ranks(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], limit: float) -> list[dict[str, Any]]:
    """Run each call in a separate process, all at once; return each one's result, or its failure."""
    context = multiprocessing.get_context("forkserver")
    # The first hides a torchvision that doesn't fit, before transformers looks for it.
    context.set_forkserver_preload(["benchmarks.zoo_models", "benchmarks.zoo_preloaded"])
    pipes, processes = [], []
    for call in calls:
        ours, theirs = context.Pipe()
        process = context.Process(target=_one, args=(theirs, function, call), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    found: list[dict[str, Any]] = [{} for _ in calls]
    deadline = time.monotonic() + limit
    waiting = dict(zip(pipes, range(len(calls)), strict=True))
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for index in waiting.values():
                text = f"did not end in {limit:g} s"
                found[index] = {"failed": text, "kind": "took too long", "at": time.time()}
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            index = waiting.pop(pipe)
            try:
                found[index] = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                processes[index].join()
                text = f"the process died (exit code {processes[index].exitcode})"
                found[index] = {"failed": text, "kind": "died", "at": time.time()}
            if "failed" in found[index]:
                deadline = min(deadline, time.monotonic() + 5)
    for process in processes:
        process.kill()
        process.join()
    return found


def _one(pipe: Connection, function: Callable[..., Any], call: tuple[Any, ...]) -> None:
    from benchmarks.zoo_models import Absent
    from kfac_dist.errors import KFACError

    try:
        found = function(*call)
    except BaseException as error:
        found = {"failed": f"{type(error).__name__}: {error}".strip(), "at": time.time(), "kind": "traceback"}
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, Absent) or ("build" in [frame.name for frame in frames] and not _own(frames)):
            found["kind"] = "not built"
        elif isinstance(error, KFACError):
            found["kind"] = "refused"
        else:
            last = frames[-1]
            found["failed"] += f" ({Path(last.filename).name}:{last.lineno})"
            found["traceback"] = traceback.format_exc()
            print(found["traceback"], flush=True)
    # Plain bytes: torch's own pickling would share memory with a process that may be gone by then.
    with suppress(BrokenPipeError):  # it took too long, and is no longer waited for
        pipe.send_bytes(pickle.dumps(found))


def _own(frames: Sequence[traceback.FrameSummary]) -> bool:
    names = [frame.name for frame in frames]
    after = frames[names.index("build") + 1 :]
    return any("kfac_dist" in frame.filename for frame in after)


def main() -> None:
    from benchmarks.zoo_models import families

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # that a search for unused parameters found none

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", metavar="NAME", help="names of classes or of configurations")
    parser.add_argument("--tasks", nargs="+", choices=["causal", "masked", "seq2seq", "vision", "timm"])
    parser.add_argument("--again", action="store_true", help="run those that are in the file already, too")
    parser.add_argument("--failed", action="store_true", help="run those again that did not train and agree")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for each process")
    parser.add_argument("--out", type=Path, default=RESULTS / "zoo.json")
    parser.add_argument("--page", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    before: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    known: dict[str, Any] = before.get("results", {})
    settings = {**before.get("settings", {}), "limit_seconds": arguments.limit, "agree": AGREE, **_packages()}
    settings["listed"] = len(families())
    chosen = [
        family
        for family in families()
        if (not arguments.families or {family.name, family.kind} & set(arguments.families))
        and (not arguments.tasks or family.task in arguments.tasks)
        and not arguments.page
    ]
    if arguments.tasks:
        chosen.sort(key=lambda family: arguments.tasks.index(family.task))
    commit = _commit()
    for family in chosen:
        there = known.get(family.name)
        if there is not None and not arguments.again and not (arguments.failed and not _good(there)):
            continue
        found = {"task": family.task, "kind": family.kind, "commit": commit, **run(family.name, arguments.limit)}
        known[family.name] = found
        print(_line(family.name, found), flush=True)
        ordered = {each.name: known[each.name] for each in families() if each.name in known}
        write("zoo", arguments.out, settings, ordered)
    print(Counter(found["outcome"] for found in known.values()))
    if arguments.out == RESULTS / "zoo.json":
        PAGE.write_text(page(json.loads(arguments.out.read_text())))
        print(PAGE)


def _packages() -> dict[str, str]:
    """Return the versions of the packages whose families run here."""
    found = {}
    for name in ("transformers", "timm"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _commit() -> str | None:
    """Return the commit that runs; a family keeps its own, as not all of them are run at once."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _good(found: dict[str, Any]) -> bool:
    return (
        found["outcome"] == "trained"
        and found["agreement"] < AGREE
        and not any(finding[0] == "error" for finding in found["findings"])
    )


def _line(name: str, found: dict[str, Any]) -> str:
    if found["outcome"] != "trained":
        return f"{name}: {found['outcome']}: {found['message'][:300]}"
    problems = "; ".join(f"{kind}: {text[:200]}" for severity, kind, text in found["findings"] if severity == "error")
    without = found.get("agreement without K-FAC")
    return (
        f"{name}: {100 * found['covered']:.0f} % covered, ranks {found['agreement']:.1e}"
        + (f" (without K-FAC {without:.1e}, {found['least equal']})" if without is not None else "")
        + f", exact {found['exact']['blocks']} {found['exact']['worst'] or 0:.0e}"
        + ("" if found["training_mode"] else ", loss not finite")
        + (f" ERROR {problems}" if problems else "")
        + f" [{found['seconds']} s]"
    )


if __name__ == "__main__":
    main()
