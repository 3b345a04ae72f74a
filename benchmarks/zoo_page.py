"""The zoo's page in docs/, made from its result file alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
SHOWN_REASONS = 3
OWN = 3.0
"""Ranks that differ with K-FAC by no more than so many times as without it differ by the model's own doing."""
AIM = 0.95
TYPES = ("Linear", "Conv", "Embedding", "Norm")

TASKS = {
    "causal": "Causal language models",
    "seq2seq": "Sequence to sequence",
    "masked": "Masked language models",
    "vision": "Images",
    "timm": "timm",
}

_HEAD = """# The zoo

Results of [`doctor`](doctor.md), and of five steps with K-FAC on one rank and on two with the same global batches, for
classes of transformers {transformers} that predict tokens or classify images, each built from its configuration
(small: two layers, width 32, random weights){timm}.

- **covered**: share of the parameters' values that have a block. The others keep their plain gradient; the next column
  gives the reasons, with their shares.
- **exact**: blocks that must equal the exact Gauss–Newton matrix (one sample, one position), and the largest error.
- **ranks**: largest difference of a parameter on two ranks from one rank's, after the steps, relative to its tensor's
  largest value, without dropout or other randomness. Unless it is near zero, the difference without K-FAC follows in
  brackets: within a factor of {own:g}, the model itself causes it (it couples the samples of a batch, or amplifies
  rounding); beyond, K-FAC does.

{summary}

Made by `python -m benchmarks.zoo`, which runs each family in separate processes; all results are in
[`zoo.json`](../benchmarks/results/zoo.json). The last column is the commit of the package at which a family was run.
On {machine}.
"""


def page(report: dict[str, Any]) -> str:
    """Return the page in Markdown."""
    results = report["results"]
    versions = report["versions"]
    parts = [
        _HEAD.format(
            transformers=report["settings"]["transformers"],
            timm=_timm_said(report["settings"]) if _timm(results) else "",
            own=OWN,
            summary=summary(report),
            machine=f"{report['machine']['processor']}, {report['machine']['cores']} cores, torch {versions['torch']}",
        )
    ]
    for task, title in TASKS.items():
        own = {name: found for name, found in results.items() if found["task"] == task}
        if not own:
            continue
        parts.append(f"## {title}\n")
        rows = {name: found for name, found in own.items() if found["outcome"] == "trained"}
        parts.append(
            "| | covered | without a block | exact | ranks | `doctor` | commit |\n|---|---:|---|---|---|---|---|"
        )
        parts[-1] += "".join("\n" + _row(name, found, report["settings"]["agree"]) for name, found in rows.items())
        others = {name: found for name, found in own.items() if name not in rows}
        parts[-1] += "\n"
        if others:
            listed = "\n".join(
                f"- `{name}`: {found['outcome']}: {_short(found['message'])}" for name, found in others.items()
            )
            parts.append(f"Not trained:\n\n{listed}\n")
    return "\n".join(parts)


def summary(report: dict[str, Any]) -> str:
    """Return the counts in a few sentences."""
    results, agree = report["results"], report["settings"]["agree"]
    built = {name: found for name, found in results.items() if found["outcome"] != "not built"}
    trained = {name: found for name, found in built.items() if found["outcome"] == "trained"}
    named = {name: found for name, found in trained.items() if not found["unnamed"]}
    ready = [found for found in trained.values() if not _errors(found)]
    judged = Counter(verdict(found, agree) for found in trained.values())
    kinds = {found["kind"] for found in built.values()}
    fulfilled = kinds - {found["kind"] for name, found in built.items() if name not in named}
    absent = len(results) - len(built)
    layers = [found["layers"].get(kind, [0, 0]) for found in trained.values() for kind in TYPES]
    covered, values = (sum(column) for column in zip(*layers, strict=True))
    apart = judged[APART]
    said = [
        f"Of {report['settings']['listed']} classes {len(results)} have been run; {len(built)} of them, of "
        f"{len(kinds)} families, could be built{f' and {absent} could not' if absent else ''}.",
        f"**{len(trained)} of {len(built)} train**, and in {len(named)} of these every parameter has a block or a "
        "reason for having none.",
        f"`doctor` finds {len(ready)} ready.",
        f"On two ranks {judged[SAME]} come to the same parameters as on one"
        + (f"; in {judged[MODEL]} the difference is the model's own" if judged[MODEL] else "")
        + (f", in {apart} it is K-FAC's" if apart else "")
        + ".",
    ]
    aim = [
        f"The aim is that {100 * AIM:g} % of the families train with every Linear layer, convolution, embedding and "
        f"norm covered or named with its reason: **{len(fulfilled)} of {len(kinds)} families do, "
        f"{100 * len(fulfilled) / len(kinds):.1f} %**"
        + ("." if len(fulfilled) >= AIM * len(kinds) else ", which falls short of it."),
        f"Of the values of their Linear layers, convolutions, embeddings and norms {100 * covered / values:.1f} % have "
        "a block.",
    ]
    if left := report["settings"]["listed"] - len(results):
        aim.append(f"{left} that are listed have not been run yet: those that have no row here.")
    return " ".join(said) + "\n\n" + " ".join(aim)


SAME, MODEL, APART = "same", "the model's own", "apart"


def verdict(found: dict[str, Any], agree: float) -> str:
    """Return whether two ranks reach one rank's parameters, and if not, whether they would without K-FAC."""
    if found["agreement"] < agree:
        return SAME
    without = _without(found)
    # Without K-FAC it may diverge altogether, which no difference is larger than.
    return MODEL if math.isnan(without) or found["agreement"] <= OWN * without else APART


def _timm_said(settings: dict[str, Any]) -> str:
    torch = settings.get("timm_torch")  # timm needs a torchvision, which may need another torch
    return f", and small models of timm {settings['timm']}" + (f" with torch {torch}" if torch else "")


def _timm(results: dict[str, Any]) -> bool:
    return any(found["task"] == "timm" for found in results.values())


def _without(found: dict[str, Any]) -> float:
    value = found.get("agreement without K-FAC", 0.0)
    return float(value)


def _errors(found: dict[str, Any]) -> list[str]:
    return [f"{check}: {text}" for severity, check, text in found["findings"] if severity == "error"]


def _row(name: str, found: dict[str, Any], agree: float) -> str:
    ranks = f"{found['agreement']:.0e}"
    if not found["agreement"] < agree:
        whose = "" if verdict(found, agree) == APART else ", the model's own"
        ranks += f" ({_without(found):.0e}{whose})"
    exact = found["exact"]
    worst = f"{exact['blocks']}, {exact['worst']:.0e}" if exact["blocks"] else "–"
    warned = Counter(check for severity, check, _ in found["findings"] if severity == "warning")
    said = "; ".join(map(_short, _errors(found))) or ("ready" + (f" (remarks: {', '.join(warned)})" if warned else ""))
    cells = (f"`{name}`", f"{100 * found['covered']:.0f} %", _reasons(found), worst, ranks, said, found["commit"])
    return "| " + " | ".join(map(str, cells)) + " |"


def _reasons(found: dict[str, Any]) -> str:
    ordered = sorted(found["reasons"].items(), key=lambda pair: -pair[1]["values"])
    shown = [f"{reason} ({_share(counts['values'], found)})" for reason, counts in ordered[:SHOWN_REASONS]]
    if len(ordered) > SHOWN_REASONS:
        rest = sum(counts["values"] for _, counts in ordered[SHOWN_REASONS:])
        shown.append(f"{len(ordered) - SHOWN_REASONS} more reasons ({_share(rest, found)})")
    return _cell("; ".join(shown))


def _share(values: int, found: dict[str, Any]) -> str:
    share = 100 * values / found["parameters"]
    return f"{share:.0f} %" if share >= 1 else f"{share:.1f} %" if share >= 0.05 else "< 0.1 %"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return _cell(line if len(line) <= 160 else line[:157] + "…")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[").replace("_", "\\_")
