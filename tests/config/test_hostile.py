"""Files that no person writes: each ends at once, within bounds of time and memory, with one line and code 2."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.config.bad import GOOD, refused

GIB = 2**30


def named(value: str) -> str:
    """A good file but for its run.name."""
    return GOOD.replace("name: good", f"name: {value}")


def one_line(*arguments: str) -> str:
    """Refuse, quickly and in one line that a terminal shows."""
    began = time.process_time()
    lines = refused(list(arguments)).splitlines()
    assert time.process_time() - began < 20
    assert len(lines) == 1
    assert len(lines[0]) < 700, lines[0][:700]
    assert lines[0].isprintable()
    return lines[0]


def laughs(levels: int, width: int, key: str = "lol") -> str:
    lines = [f"{key}0: &a0 [x{', x' * (width - 1)}]"]
    lines += [f"{key}{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def merges(levels: int, width: int) -> str:
    lines = ["m0: &m0 {x: 1}"]
    lines += [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * width)}]}}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def chain(length: int) -> str:
    return "c0: &c0 [x]\n" + "".join(f"c{n}: &c{n} [*c{n - 1}]\n" for n in range(1, length))


MANY = "more than 20,000 values, with aliases written out: no configuration has so many"
DEEP = "nested too deeply to be a configuration: more than 50 levels"

TEXTS: dict[str, tuple[str, str]] = {
    "nine to the ninth": (GOOD + laughs(9, 9), f":24: {MANY}"),
    "25 doubled aliases": (GOOD + laughs(25, 2), f": {MANY}"),
    "merges of merges": (GOOD + merges(9, 9), f": {MANY}"),
    "a chain of aliases": (GOOD + chain(3000), f": {DEEP}"),
    "many values": (GOOD + "zzz: [" + "1," * 21_000 + "1]\n", f": {MANY}"),
    "deep lists": (GOOD + "zzz: " + "[" * 3000 + "]" * 3000, f":20: {DEEP}"),
    "deep mappings": (GOOD + "zzz: " + "{a: " * 3000 + "1" + "}" * 3000, f":20: {DEEP}"),
    "deep blocks": (GOOD + "".join(" " * n + f"k{n}:\n" for n in range(400)), f": {DEEP}"),
    "an open end of deep lists": (GOOD + "zzz: " + "[" * 100_000, f":20: {DEEP}"),
    "a huge key": (GOOD + "? " + "k" * 200_000 + "\n: 1\n", f":20: {'k' * 57}...: unknown key"),
    "a huge value": (named("n" * 200_000), f":2: run.name: found '{'n' * 57}...', expected"),
    "a huge number": (GOOD.replace("steps: 4", "steps: " + "9" * 5000), f"14: '{'9' * 57}...' is no value of its tag"),
    "a huge tag": (named("!" + "t" * 5000 + " x"), "the YAML tag !ttt"),
    "a huge alias": (named("*" + "t" * 5000), "not valid YAML: found undefined alias 'ttt"),
    "a key of two lines": (GOOD + '"a\\nerror: b\\e[31m": 1\n', r":20: a\nerror: b\x1b[31m: unknown key"),
    "a value of two lines": (named('"a\\nb"'), r"run.name: found 'a\nb', expected"),
    "a NUL in the include": ('include: "a\\0b"\n' + GOOD, r":1: include: found 'a\x00b', expected a file name"),
    "a long include": (f"include: {'n' * 5000}\n" + GOOD, f":1: include: found '{'n' * 57}...', expected a file"),
    "an include of a device": ("include: /dev/zero\n" + GOOD, ":1: /dev/zero: is a device, expected a regular file"),
    "an include of a folder": ("include: /tmp\n" + GOOD, ":1: /tmp: can't be read: Is a directory"),
    "a control character": (named("go\x01od"), ":2: not valid YAML: special characters"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS.keys())
def test_a_hostile_text_is_one_line(good: Path, text: str, message: str) -> None:
    good.write_text(text)

    assert message in one_line(str(good))


BYTES: dict[str, tuple[bytes, str]] = {
    "50 MB": (GOOD.encode() + b"#" * 50_000_000, "has 50,000,266 bytes, more than the 262,144 that are read"),
    "UTF-16": (GOOD.encode("utf-16"), "not text (byte 3 is NUL): save the file as UTF-8"),
    "UTF-16 without a mark": (GOOD.encode("utf-16-le"), "not text (byte 1 is NUL): save the file as UTF-8"),
    "UTF-32": (GOOD.encode("utf-32"), "is NUL): save the file as UTF-8"),
    "NUL": (GOOD.encode() + b"\0", "not text (byte 266 is NUL)"),
    "binary": (b"\x7fELF\x02\x01\x01\0\0\0", "not text (byte 7 is NUL)"),
    "gzip": (b"\x1f\x8b\x08\x08", "not UTF-8 text (byte 1)"),
}


@pytest.mark.parametrize(("content", "message"), BYTES.values(), ids=BYTES.keys())
def test_hostile_bytes_are_one_line(good: Path, content: bytes, message: str) -> None:
    good.write_bytes(content)

    assert message in one_line(str(good))


def test_thousands_of_mistakes_are_ten_lines(good: Path) -> None:
    for text in (
        GOOD + "".join(f"{'key' * 10}{n}: 1\n" for n in range(4000)),
        GOOD + "zzz: 1\n" * 4000,
        GOOD + "".join(f"{n}: 1\n" for n in range(4000)),
        GOOD.replace("  lr: 0.1\n", "  lr: 0.1\n" + "".join(f"  lr{n}: 1\n" for n in range(4000))),
    ):
        good.write_text(text)
        began = time.process_time()
        lines = refused([str(good)]).splitlines()
        assert len(lines) == 11
        assert lines[-1].startswith("error: … and ")
        assert time.process_time() - began < 20


def test_includes_of_includes_are_counted(tmp_path: Path) -> None:
    for n in range(9):
        (tmp_path / f"{n}.yaml").write_text(f"include: [{', '.join([f'{n + 1}.yaml'] * 9)}]\n")
    (tmp_path / "9.yaml").write_text("run: {name: a}\n")
    assert "with it the configuration has more than 100 files" in one_line(str(tmp_path / "0.yaml"))

    (tmp_path / "large.yaml").write_text("#" * 200_000 + "\nrun: {name: a}\n")
    (tmp_path / "twice.yaml").write_text("include: [large.yaml, large.yaml]\n")
    assert "with it the configuration has more than 262,144 characters" in one_line(str(tmp_path / "twice.yaml"))

    (tmp_path / "values.yaml").write_text("zzz: [" + "1," * 12_000 + "1]\n")
    (tmp_path / "twice.yaml").write_text("include: [values.yaml, values.yaml]\n")
    assert "with it the configuration has more than 20,000 values" in one_line(str(tmp_path / "twice.yaml"))


def test_links_in_a_circle_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to(tmp_path / "b.yaml")
    (tmp_path / "b.yaml").symlink_to(tmp_path / "a.yaml")

    assert "can't be read: Too many levels of symbolic links" in one_line(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.args.dims=" + "[" * 9 + laughs(9, 9).replace("\n", " "), "error: command line (model.args.dims=[[["),
        ("model.args.dims={" + laughs(9, 9).replace("\n", ", ") + "}", f"...): {MANY}"),
        ("model.args.dims=" + "[" * 3000 + "]" * 3000, f"...): {DEEP}"),
        ("model.args.dims=[" + "1, " * 21_000 + "1]", f"...): {MANY}"),
        (".".join(["model", "args"] + ["a"] * 3000) + "=1", "command line: found 'model.args.a.a"),
        ("run.name=" + "n" * 100_000, f"run.name: found '{'n' * 57}...', expected"),
        ("x" * 100_000, f"command line: found '{'x' * 57}...', expected key=value"),
        ("run.name='a\nb'", r"command line (run.name='a\nb'): run.name: found 'a b', expected"),
        ("run.\nname=a", r"command line (run.\nname=a): run.\nname: unknown key"),
    ],
    ids=["open", "aliases", "depth", "values", "path", "text", "no value", "lines", "lines in the key"],
)
def test_a_hostile_argument_is_one_line(good: Path, argument: str, message: str) -> None:
    assert message in one_line(str(good), argument)


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (2 * GIB, 2 * GIB))


def fifo(folder: Path) -> str:
    os.mkfifo(folder / "fifo")
    return str(folder / "fifo")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (lambda folder: "/dev/zero", "/dev/zero: is a device, expected a regular file"),
        (fifo, "fifo: is a FIFO, expected a regular file"),
        (lambda folder: "/dev/stdin", "is a FIFO, expected a regular file"),
    ],
    ids=["device", "FIFO", "pipe"],
)
def test_what_has_no_end_is_refused_by_a_real_process(
    tmp_path: Path, place: Callable[[Path], str], message: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "kfac_dist", "train", place(tmp_path)],
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=limited,
        check=False,
    )

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.endswith(message + "\n")
    assert len(ended.stderr.splitlines()) == 1
