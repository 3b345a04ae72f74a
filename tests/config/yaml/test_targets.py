from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.config.schema import Target
from kfac_dist.config.yaml.targets import build_target, load_target
from kfac_dist.errors import ConfigError


def digits(size: int, *, noise: float = 0.0) -> tuple[int, float]:
    if size < 0:
        raise ValueError(f"size {size} is negative")
    return size, noise


SHIPPED: dict[str, Callable[..., Any]] = {"digits": digits, "anything": dict}

USER_MODULE = """\
import math

class Net:
    def __init__(self, width, depth=2): self.width, self.depth = width, depth
    @classmethod
    def small(cls): return cls(1)

def free(**options): return options
def fails(): return [][1]
def picky(x): raise TypeError("no")
def at(x, /): return x

constant = 3
"""


MAKES = """\
import functools
from collections import OrderedDict
from os import system
from typing import Any, Union

calls = []

class Product: pass
class Special(Product): pass
class Other: pass
class Odd:
    def __new__(cls): return Product()

def silent(): calls.append("silent"); return Product()
def says() -> Product: return Product()
def special() -> Special: return Special()
def anything() -> Any: return Product()
def either() -> Union[Product, int]: return Product()
def unknown() -> "NoSuchName": return Product()
def number() -> int: calls.append("number")
def nothing() -> None: calls.append("nothing")
def pair() -> tuple[int, int]: return 1, 2

part = functools.partial(says)
part_of_python = functools.partial(system)
class Maker:
    def __call__(self): return Product()
    def make(self) -> Product: return Product()
maker = Maker()
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with modules of a user's own, forgotten afterwards."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "net.py").write_text(USER_MODULE)
    (tmp_path / "mine" / "needs.py").write_text("import a_package_that_nobody_has\n")
    (tmp_path / "mine" / "broken.py").write_text("1 / 0\n")
    (tmp_path / "mine" / "script.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "mine" / "makes.py").write_text(MAKES)
    (tmp_path / "calendar.py").write_text("def model(): return 1\n")
    (tmp_path / "mine" / "typo.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for name in [name for name in sys.modules if name == "mine" or name.startswith("mine.")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def test_a_shipped_name_is_called_with_its_arguments() -> None:
    assert load_target(Target(name="digits", args={"size": 3}), SHIPPED, "data") is digits
    assert build_target(Target(name="digits", args={"size": 3, "noise": 0.5}), SHIPPED, "data") == (3, 0.5)


def test_a_users_own_is_found_from_the_working_directory(workplace: Path) -> None:
    net = build_target(Target(name="mine.net:Net", args={"width": 4}), SHIPPED, "model")

    assert (net.width, net.depth) == (4, 2)
    assert build_target(Target(name="mine.net:Net.small"), SHIPPED, "model").width == 1
    assert build_target(Target(name="mine.net:free", args={"x": 1}), SHIPPED, "model") == {"x": 1}


def test_a_callable_without_a_signature_is_taken_at_its_word() -> None:
    assert build_target(Target(name="anything", args={"a": 1}), SHIPPED, "data") == {"a": 1}


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "digit",
            {},
            r"data.name: found 'digit'; did you mean 'digits'\?; expected one of anything, digits, or your own",
        ),
        ("zzz", {}, r"data.name: found 'zzz'; expected one of anything, digits"),
        ("digits", {"size": 1, "nois": 2}, r"data.args.nois: digits takes no such argument; did you mean 'noise'\?"),
        ("digits", {"noise": 2}, r"data.args.size: missing; digits needs it"),
        ("digits", {"size": -1}, r"data.args: digits refuses them: size -1 is negative"),
        ("mine.net:Nett", {}, r"but mine.net has no 'Nett'; did you mean 'Net'\?"),
        ("mine.net:Net.tall", {}, r"but mine.net.Net has no 'tall'"),
        ("mine.net:constant", {}, r"which is int, not something to call"),
        ("mine.net:Net", {"widht": 1}, r"did you mean 'width'\?; it takes width, depth\ndata.args.width: missing"),
        ("mine.nett:Net", {}, r"there is no module 'mine.nett': modules are looked up in"),
        ("yours.net:Net", {}, r"there is no module 'yours'"),
        ("mine.needs:f", {}, r"importing mine.needs fails: No module named 'a_package_that_nobody_has'"),
        ("mine.broken:f", {}, r"importing mine.broken raises ZeroDivisionError"),
        ("mine.typo:f", {}, r"importing mine.typo raises SyntaxError"),
        ("mine.net:fails", {}, r"^data.name: mine.net:fails fails: list index out of range \(IndexError in .*py:\d+\)"),
        ("mine.net:picky", {"x": 1}, r"^data.args: mine.net:picky refuses them: no \(TypeError in .*net.py:\d+\)"),
        ("mine.script:f", {}, r"importing mine.script raises SystemExit: 3"),
        ("mine.net:at", {}, r"data.name: mine.net:at takes x by position only"),
        ("mine/net.py:Net", {}, r"expected package.module:callable"),
        ("mine.net:", {}, r"expected package.module:callable"),
        (":Net", {}, r"expected package.module:callable"),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_what_cannot_be_built_is_named(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_target(Target(name=name, args=args), SHIPPED, "data")


@pytest.fixture
def product(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    monkeypatch.syspath_prepend(str(workplace))
    found: type = importlib.import_module("mine.makes").Product
    return found


@pytest.mark.parametrize(
    "name",
    [
        "Product",
        "Special",
        "Odd",
        "silent",
        "says",
        "special",
        "anything",
        "either",
        "unknown",
        "part",
        "maker",
        "maker.make",
    ],
)
def test_what_may_make_the_thing_is_taken(product: type, name: str) -> None:
    target = Target(name=f"mine.makes:{name}")

    assert callable(load_target(target, SHIPPED, "model", product))
    assert importlib.import_module("mine.makes").calls == []
    assert isinstance(build_target(target, SHIPPED, "model", product), product)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "os:system",
            {"command": "touch called"},
            "which no mine's Product can come from, and which is not called: it is",
        ),
        ("os:system", {}, "which no mine's Product can come from"),
        ("mine.makes:system", {"command": "touch called"}, "which no mine's Product can come from"),
        ("mine.makes:part_of_python", {"command": "touch called"}, "which no mine's Product can come from"),
        ("subprocess:run", {"args": ["touch", "called"]}, "which no mine's Product can come from"),
        ("subprocess:Popen", {"args": ["touch", "called"]}, "which no mine's Product can come from"),
        ("subprocess:getoutput", {"cmd": "touch called"}, "which no mine's Product can come from"),
        ("shutil:rmtree", {"path": "mine"}, "which no mine's Product can come from"),
        ("pathlib:Path.cwd", {}, "which no mine's Product can come from"),
        ("mine.makes:OrderedDict", {}, "which no mine's Product can come from"),
        ("builtins:exec", {}, "takes source by position only"),
        ("mine.makes:Other", {}, "which makes mine.makes.Other, expected a maker of mine's Product"),
        ("mine.makes:number", {}, "which says that it returns builtins.int, expected a maker of mine's Product"),
        ("mine.makes:nothing", {}, "which says that it returns builtins.NoneType"),
        ("mine.makes:pair", {}, "which says that it returns builtins.tuple"),
    ],
)
def test_what_can_not_make_the_thing_is_not_called(
    product: type, workplace: Path, name: str, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_target(Target(name=name, args=args), SHIPPED, "model", product)

    assert message in str(caught.value)
    assert not (workplace / "called").exists()
    assert (workplace / "mine" / "makes.py").exists()
    assert importlib.import_module("mine.makes").calls == []


def test_a_users_module_may_be_named_like_one_of_pythons(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "calendar", raising=False)
    monkeypatch.syspath_prepend(str(workplace))

    assert build_target(Target(name="calendar:model"), SHIPPED, "model", int) == 1
