"""Malformed configurations: each ends the command line with code 2 and a message, and without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.bad import GOOD, refused

# What the file says instead of a line of GOOD → what the message says. {file} is the file's path.
LINES = {
    "text for a count": ("batch_size: 64", "batch_size: many", "{file}:13: train.batch_size: found 'many'"),
    "quoted count": ("batch_size: 64", "batch_size: '64'", "expected a whole number >= 1: leave out the quotes"),
    "fraction for a count": ("batch_size: 64", "batch_size: 6.5", "found 6.5, expected a whole number >= 1"),
    "float for a count": ("batch_size: 64", "batch_size: 64.0", "found 64.0, expected a whole number >= 1"),
    "boolean for a count": ("batch_size: 64", "batch_size: true", "found true, expected a whole number >= 1"),
    "batch that doesn't grow": (
        "batch_size: 64",
        "batch_size: 64\n  batch_growth: {final: 64, steps: 9}",
        "train.batch_growth.final (64) must exceed batch_size (64)",
    ),
    "growing batch under DeepSpeed": (
        "train:\n  batch_size: 64",
        "engine: {name: zero1}\ntrain:\n  batch_size: 64\n  batch_growth: {final: 128, steps: 9}",
        "train.batch_growth and engine.name zero1 exclude each other",
    ),
    "drawn labels for the diagonal of an empirical Fisher": (
        "factor_every: 10",
        "factor_every: 10\n    uncovered: diagonal_mc",
        "uncovered diagonal_mc draws labels from the model, which fisher empirical doesn't: set fisher to mc or type2",
    ),
    "drawn labels for the diagonal of shards": (
        "kfac:\n  curvature:",
        "engine: {name: fsdp2}\nkfac:\n  curvature:\n    fisher: mc\n    uncovered: diagonal_mc",
        "kfac.curvature.uncovered diagonal_mc needs engine.name: ddp, found fsdp2",
    ),
    "groups apart by class": (
        "factor_every: 10\n  inversion:",
        "factor_every: 10\n    class_conditional: true\n  inversion:\n    splits: {conv: per_group}",
        "kfac.inversion.splits (conv: per_group) and curvature.class_conditional exclude each other",
    ),
    "sizes without a side": (
        "inverse_every: 100",
        "inverse_every: 100\n    splits: {encoder: [3, 4]}",
        "kfac.inversion.splits.encoder: sizes [3, 4] need a side: write {{outputs: [3, 4]}}, or inputs",
    ),
    "a way to split that there isn't": (
        "inverse_every: 100",
        "inverse_every: 100\n    splits: {encoder: per_haed}",
        "found 'per_haed', expected one of per_head, per_group or null; did you mean 'per_head'?",
    ),
    "heads and sizes": (
        "inverse_every: 100",
        "inverse_every: 100\n    splits: {encoder: {by: per_head, inputs: 2}}",
        "give per_head, per_group, a number, or a mapping with inputs or outputs: one of them",
    ),
    "number of heads without heads": (
        "inverse_every: 100",
        "inverse_every: 100\n    splits: {encoder: {outputs: 2, heads: 2}}",
        "kfac.inversion.splits.encoder.heads has no effect without by: per_head",
    ),
    "no parts": ("inverse_every: 100", "inverse_every: 100\n    splits: {encoder: 0}", "expected a whole number >= 1"),
    "moments without EKFAC": (
        "inverse_every: 100",
        "inverse_every: 100\n    rescale_every: 5",
        "kfac.inversion.rescale_every has no effect on solver cholesky",
    ),
    "moments between measurements": (
        "inverse_every: 100",
        "inverse_every: 100\n    solver: ekfac\n    rescale_every: 4",
        "kfac.inversion.rescale_every (4) must divide curvature.factor_every (10)",
    ),
    "EKFAC with bases on the host": (
        "inverse_every: 100",
        "inverse_every: 100\n    solver: ekfac\n    offload: true",
        "kfac.inversion.offload and inversion.solver ekfac exclude each other",
    ),
    "EKFAC without output gradients": (
        "factor_every: 10\n  inversion:",
        "factor_every: 10\n    fisher: input_only\n  inversion:\n    solver: ekfac",
        "kfac.inversion.solver ekfac needs the gradients of single samples",
    ),
    "zero count": ("batch_size: 64", "batch_size: 0", "found 0, expected a whole number >= 1"),
    "null count": ("batch_size: 64", "batch_size:", "found null, expected a whole number >= 1"),
    "missing key": ("  batch_size: 64\n", "", "{file}:12: train.batch_size: missing; expected a whole number >= 1"),
    "missing section": ("loss:\n  name: sigmoid_cross_entropy\n", "", "loss: missing; expected a mapping with keys"),
    "negative lr": ("lr: 0.1", "lr: -0.1", "optimizer.lr.value: found -0.1, expected a number > 0"),
    "boolean lr": ("lr: 0.1", "lr: true", "optimizer.lr: found true, expected a number > 0 or a mapping"),
    "infinite lr": ("lr: 0.1", "lr: .inf", "optimizer.lr.value: found inf, expected a number > 0"),
    "momentum not a number": ("momentum: 0.9", "momentum: .nan", "found nan, expected a number >= 0 and < 1"),
    "momentum out of range": ("momentum: 0.9", "momentum: 1.0", "found 1.0, expected a number >= 0 and < 1"),
    "octal-looking number": ("momentum: 0.9", "momentum: 09", "found '09', expected a number"),
    "list for a number": ("momentum: 0.9", "momentum: [0.9]", "optimizer.momentum: found [0.9], expected a number"),
    "list for a section": ("  batch_size: 64\n  steps: 4", "  - 1", "train: found [1], expected a mapping with keys"),
    "text for a section": ("  name: sigmoid_cross_entropy", "  mse", "loss: found 'mse', expected a mapping"),
    "mapping for text": ("name: good", "name: {a: 1}", "run.name: found a mapping, expected text that matches"),
    "number for text": ("name: good", "name: 3", "{file}:2: run.name: found 3, expected text that matches"),
    "path as run name": ("name: good", "name: ../other", "run.name: found '../other', expected text that matches"),
    "yes for a flag": ("  momentum: 0.9", "  nesterov: yes", "nesterov: found 'yes', expected true or false"),
    "number for a flag": ("  momentum: 0.9", "  nesterov: 1", "nesterov: found 1, expected true or false"),
    "misspelt key": ("momentum: 0.9", "momentun: 0.9", "optimizer.momentun: unknown key; did you mean 'momentum'?"),
    "misspelt section": ("train:", "trian:", "{file}:12: trian: unknown key; did you mean 'train'?"),
    "key of another section": ("momentum: 0.9", "batch_size: 9", "unknown key; did you mean train.batch_size?"),
    "key of nowhere": ("momentum: 0.9", "zzz: 9", "optimizer.zzz: unknown key; the keys here are name, lr, momentum"),
    "unknown loss": ("sigmoid_cross_entropy", "sigmoid_crossentropy", "did you mean 'sigmoid_cross_entropy'?"),
    "unknown optimizer": ("momentum: 0.9", "name: adam", "expected one of sgd, adamw, ssd, mssd, svag, msvag; did"),
    "empty target": ("data: digits", "data: ''", "data.name: found '', expected non-empty text"),
    "number for a target": ("data: digits", "data: 3", "data: found 3, expected a name or a mapping"),
    "list for arguments": ("args: {dims: [64, 8]}", "args: [64, 8]", "model.args: found [64, 8], expected a mapping"),
    "misaligned intervals": (
        "inverse_every: 100",
        "inverse_every: 105",
        "{file}:19: kfac.inversion.inverse_every (105)",
    ),
    "steps and epochs": ("steps: 4", "steps: 4\n  epochs: 2", "{file}:14: train.steps: give steps or epochs"),
    "neither steps nor epochs": ("  steps: 4\n", "", "train: give steps or epochs, one of the two"),
    "batch smaller than micro-batches": ("steps: 4", "steps: 4\n  accumulate: 65", "train.batch_size (64) must be at"),
    "adversarial loss without a game": (
        "sigmoid_cross_entropy",
        "adversarial",
        "{file}:8: loss.name adversarial is the",
    ),
    "game with another loss": ("kfac:", "game: {}\nkfac:", "{file}:8: loss.name (sigmoid_cross_entropy) is no game's"),
    "game under another engine": (
        "sigmoid_cross_entropy",
        "adversarial\ngame: {}\nengine: {name: fsdp2}",
        "{file}:10: engine has no effect on a game",
    ),
    "game with accumulation": (
        "sigmoid_cross_entropy\noptimizer:\n  lr: 0.1\n  momentum: 0.9\ntrain:\n",
        "adversarial\noptimizer:\n  lr: 0.1\ngame: {}\ntrain:\n  accumulate: 2\n",
        "{file}:13: train.accumulate (2) must be 1 in a game",
    ),
    "alignment without adjustment": (
        "kfac:",
        "game: {adjustment: 0.0, align: true}\nkfac:",
        "game.align has no effect while adjustment is 0",
    ),
    "duplicate key": ("steps: 4", "steps: 4\n  steps: 5", "{file}:15: train.steps: given twice, first in line 14"),
    "duplicate section": ("kfac:", "run: {name: b}\nkfac:", "{file}:15: run: given twice, first in line 1"),
    "key that isn't text": ("steps: 4", "4: 4", "{file}:14: keys are text, found 4: quote it"),
    "key that is a list": ("steps: 4", "? [a]\n  : 4", "{file}:14: keys are text, found a collection"),
    "tab": ("  steps: 4", "\tsteps: 4", "{file}:14: not valid YAML: found a tab: indent with spaces"),
    "open bracket": ("dims: [64, 8]", "dims: [64, 8", "{file}:5: not valid YAML: expected ',' or ']'"),
    "bad indentation": ("  steps: 4", "   steps: 4", "{file}:14: not valid YAML"),
    "python object": (
        "name: good",
        "name: !!python/name:os.system x",
        "{file}:2: the YAML tag !!python/name:os.system",
    ),
    "tagged collection": ("data: digits", "data: !!set {digits}", "the YAML tag !!set is not supported"),
    "tag that lies": ("steps: 4", "steps: !!int four", "'four' is no value of its tag"),
    "unknown alias": ("steps: 4", "steps: *steps", "{file}:14: not valid YAML: found undefined alias"),
    "alias of itself": ("args: {dims: [64, 8]}", "args: &a {dims: *a}", "refers to the value that it is part of"),
    "merge of a scalar": ("steps: 4", "<<: 4", "{file}:14: << merges mappings, found 4"),
    "two documents": ("train:", "---\ntrain:", "{file}:12: not valid YAML"),
    "control character": ("name: good", "name: go\x01od", "not valid YAML: special characters are not allowed"),
    "missing include": ("run:", "include: base.yaml\nrun:", "{file}:1: "),
    "number for an include": ("run:", "include: 3\nrun:", "{file}:1: include: found 3, expected a file name"),
    "include of itself": ("run:", "include: run.yaml\nrun:", "{file}:1: include: files include each other: "),
}


@pytest.mark.parametrize(("old", "new", "message"), LINES.values(), ids=LINES.keys())
def test_a_bad_line_is_named(good: Path, old: str, new: str, message: str) -> None:
    assert GOOD.count(old) == 1
    good.write_text(GOOD.replace(old, new))

    assert message.format(file=good) in refused([str(good)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; a run needs the sections"),
        (b"# nothing but a comment\n", "the file is empty; a run needs the sections"),
        (b"- a\n- b\n", "the top level is ['a', 'b'], expected a mapping of sections"),
        (b"just text", "the top level is 'just text', expected a mapping of sections"),
        (b"run: {name: \xff}", "not UTF-8 text (byte 12): save the file as UTF-8"),
        (b"\x80\x04\x95", "not UTF-8 text (byte 0)"),
    ],
    ids=["empty", "comment", "list", "text", "latin-1", "binary"],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)

    assert message in refused([str(file)])


def test_a_missing_file_suggests_its_neighbour(good: Path) -> None:
    assert f"no such file; did you mean {good}?" in refused([str(good.with_name("rum.yaml"))])
    assert "nowhere.yaml: no such file" in refused(["nowhere.yaml"])


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "can't be read: Is a directory" in refused([str(tmp_path)])


def test_an_include_cycle_is_shown(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"include: {other}.yaml\n")

    output = refused([str(tmp_path / "a.yaml")])

    assert " → ".join(str(tmp_path / f"{name}.yaml") for name in "abca") in output


def test_a_mistake_in_an_included_file_names_that_file(good: Path) -> None:
    base = good.with_name("base.yaml")
    base.write_text("\noptimizer:\n  momentum: 2\n")
    good.write_text("include: base.yaml\n" + GOOD.replace("  momentum: 0.9\n", ""))

    assert f"{base}:3: optimizer.momentum: found 2, expected" in refused([str(good)])


def test_all_mistakes_are_reported_in_the_order_of_the_file_up_to_a_limit(good: Path) -> None:
    keys = "".join(f"  wrong{index}: 1\n" for index in range(14))
    good.write_text(GOOD.replace("  lr: 0.1\n", "  lr: 0.1\n" + keys))

    lines = refused([str(good)]).splitlines()

    assert len(lines) == 11
    assert [f"wrong{index}" in line for index, line in enumerate(lines[:10])] == [True] * 10
    assert lines[-1] == "error: … and 4 more"


def run_module(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, "kfac_dist", "train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.mark.parametrize("new", ["batch_size: many", "batch_size: 64\n  sedd: 1", "batch_size: [64"])
def test_a_real_process_exits_with_2(good: Path, new: str) -> None:
    good.write_text(GOOD.replace("batch_size: 64", new))

    ended = run_module(str(good))

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"error: {good}:1")
    assert len(ended.stderr.splitlines()) == 1


def test_every_rank_of_a_launcher_exits_with_2_and_one_of_them_speaks(good: Path) -> None:
    good.write_text(GOOD.replace("batch_size: 64", "batch_size: many"))
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")

    ended = run_module(str(good), launcher=launcher)

    assert ended.returncode == 1  # the launcher's own code
    assert ended.stderr.count("train.batch_size: found 'many', expected a whole number >= 1") == 1
    assert ended.stderr.count("exitcode  : 2") == 2, ended.stderr
