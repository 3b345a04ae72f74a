"""Imports point one way: `training → preconditioner → {curvature, distributed, engines}`, as CONTRIBUTING.md draws it.

The sources are read, not imported, so that imports inside functions and behind TYPE_CHECKING count too.

    python -m tests.test_architecture       # draws the imports in CONTRIBUTING.md anew
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kfac_dist"
MODULES = {file.relative_to(ROOT).as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}

# What each part of the package may import from the rest of it, besides itself. A part that isn't listed is new: say
# here where it belongs.
MAY_IMPORT = {
    "errors": set(),
    "compat": {"errors"},
    "hooks": {"errors"},
    "inputs": set(),
    "precision": {"config"},
    "processes": set(),
    "reference": set(),
    "config": {"errors"},
    "curvature": {"compat", "config", "errors", "hooks", "inputs", "precision"},
    "distributed": {"config", "errors", "precision", "processes"},
    "engines": {"compat", "config", "distributed", "errors", "hooks", "precision"},
    "preconditioner": {"config", "curvature", "distributed", "engines", "errors", "hooks", "precision"},
    "optimizers": {"compat", "config", "distributed", "engines", "errors", "inputs", "preconditioner"},
    "tasks": {"config", "errors"},
    "reporting": {"config", "errors", "processes"},
    "training": {
        "compat",
        "config",
        "distributed",
        "engines",
        "errors",
        "inputs",
        "optimizers",
        "preconditioner",
        "reporting",
        "tasks",
    },
    "doctor": {
        "compat",
        "config",
        "curvature",
        "distributed",
        "engines",
        "errors",
        "hooks",
        "inputs",
        "optimizers",
        "preconditioner",
        "reporting",
        "tasks",
        "training",
        "__init__",
    },
    "planning": {
        "config",
        "curvature",
        "distributed",
        "engines",
        "errors",
        "hooks",
        "inputs",
        "precision",
        "preconditioner",
        "tasks",
    },
    "launching": {"errors"},
    "slurm": {"config", "errors", "reporting", "training"},
    "cli": {
        "config",
        "curvature",
        "distributed",
        "doctor",
        "engines",
        "errors",
        "launching",
        "planning",
        "precision",
        "preconditioner",
        "reporting",
        "slurm",
        "tasks",
        "training",
    },
    "integrations": {"config", "hooks", "preconditioner"},
    "extensions": {"config", "curvature", "distributed", "engines", "errors", "preconditioner", "reporting"},
    "__main__": {"cli"},
    "__init__": {"config", "errors", "preconditioner"},
}

# A folder with more files hides what is in it.
FILES_IN_A_FOLDER = 13

# Prefix of a path → prefixes of modules that nothing there imports, and why.
NEVER = [
    ("kfac_dist/curvature/", "torch.distributed", "curvature knows no ranks"),
    ("kfac_dist/distributed/startup/rank_info.py", "torch", "a command line finds its place in milliseconds"),
    ("kfac_dist/config/", "torch", "a configuration is checked in milliseconds"),
    ("kfac_dist/errors.py", "torch", "errors are plain"),
    ("kfac_dist/compat/", "kfac_dist.curvature", "what other packages keep to themselves is no part of K-FAC"),
    ("kfac_dist/preconditioner/", "kfac_dist.engines.ddp", "K-FAC sees engines through their base class"),
    ("kfac_dist/preconditioner/", "kfac_dist.engines.fsdp2", "K-FAC sees engines through their base class"),
    ("kfac_dist/preconditioner/", "kfac_dist.engines.zero.engine", "K-FAC sees engines through their base class"),
    ("kfac_dist/", "tests", "the package stands without its tests"),
    ("kfac_dist/", "benchmarks", "the package stands without its benchmarks"),
]

# Module → the only paths that import it: optional packages stay behind one door.
ONLY = {
    "deepspeed": ("kfac_dist/engines/zero", "kfac_dist/compat/deepspeed.py"),
    "mpi4py": ("kfac_dist/distributed/",),
    "typer": ("kfac_dist/cli/",),
    "transformers": ("kfac_dist/integrations/huggingface.py",),
    "mlxtend": ("kfac_dist/tasks/",),
    "sklearn": ("kfac_dist/tasks/",),
    "django": ("kfac_dist/tasks/catalogues.py",),
    "babel": ("kfac_dist/tasks/catalogues.py",),
    "tokenizers": ("kfac_dist/tasks/translation",),
    "sacrebleu": ("kfac_dist/tasks/translation_score.py",),
    "matplotlib": ("kfac_dist/reporting/",),
    "prometheus_client": ("kfac_dist/reporting/exporter.py",),
}

# Where names are used that other packages keep to themselves: a release may take them away, and one file has to change.
PRIVATE = ("kfac_dist/compat/",)
# `torch._foreach_*` are documented, and so are an enumeration's `_name_` and `_value_`; `os._exit` is public by another
# name, and a named tuple's methods are too.
NOT_PRIVATE = ("_foreach_", "_exit", "_name_", "_value_", "_replace", "_asdict", "_fields", "_make")

# What the parts below `training` may read of a configuration: values, not files.
PLAIN_CONFIG = (
    "kfac_dist.config.schema",
    "kfac_dist.config.schedules",
    "kfac_dist.config.yaml.options",
)


def imports_of(source: str, path: str) -> Iterator[str]:
    """Full names of everything that a source imports, `from a import b` as `a.b`."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", *NOT_PRIVATE)) and name != "_"


def private_names_in(source: str) -> Iterator[str]:
    """Private names of other packages that a source imports, reads off an object, or asks for by `getattr`.

    What the source itself defines, or what belongs to `self`, is its own.
    """
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    }
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if any(map(private, alias.name.split("."))))
            case ast.ImportFrom(module=str(module), names=names) if not module.startswith("kfac_dist"):
                parts = [*module.split("."), *(alias.name for alias in names)]
                yield from (f"{module}.{part}" for part in parts if private(part))
            case ast.Attribute(attr=name) if private(name) and name not in own:
                yield ast.unparse(node)
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=name), *_]):
                if isinstance(name, str) and private(name) and name not in own:
                    yield ast.unparse(node)
            case ast.Subscript(value=ast.Attribute(attr="__dict__"), slice=ast.Constant(value=name)):
                if isinstance(name, str) and private(name) and name not in own:
                    yield ast.unparse(node)
            case _:
                pass


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def part_of(path: str) -> str:
    return path.removeprefix("kfac_dist/").removesuffix(".py").split("/")[0]


EDGES = [(path, name) for path, file in MODULES.items() for name in imports_of(file.read_text(), path)]


def imported_files(edges: Iterable[tuple[str, str]], modules: Iterable[str]) -> dict[str, set[str]]:
    """Path → paths of the files that it imports, given imported names; a name in a file counts as that file."""
    files = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in modules}
    found: dict[str, set[str]] = {path: set() for path in files.values()}
    for path, name in edges:
        while name and name not in files:
            name = name.rpartition(".")[0]
        if name and files[name] != path:
            found[path].add(files[name])
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes each of which leads to all others of its group, sorted."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            for node in graph[ahead.pop()] - seen:
                seen.add(node)
                ahead.append(node)
        return seen

    below = {node: reached(node) for node in graph}
    groups = {frozenset(other for other in below[node] if node in below[other]) for node in graph}
    return sorted(sorted(group) for group in groups if group)


def drawing(graph: Mapping[str, set[str]]) -> str:
    """Parts in floors, each on the floors that it imports; an import that another one implies is left out."""
    floors: dict[str, int] = {}
    while len(floors) < len(graph):
        floors |= {
            part: 1 + max((floors[other] for other in below), default=-1)
            for part, below in graph.items()
            if part not in floors and below <= set(floors)
        }

    def all_below(part: str) -> set[str]:
        return graph[part].union(*(all_below(other) for other in graph[part]))

    lines = []
    for part in sorted(graph, key=lambda part: (-floors[part], part)):
        implied: set[str] = set().union(*(all_below(other) for other in graph[part]))
        direct = sorted(graph[part] - implied, key=lambda other: (-floors[other], other))
        lines.append(f"{floors[part]:2}  {part:<15} {'→ ' + ', '.join(direct) if direct else ''}".rstrip())
    return "\n".join(["```text", *lines, "```"])


def parts_drawn() -> str:
    """The drawing of this package's parts."""
    parts: dict[str, set[str]] = {part: set() for part in MAY_IMPORT if not part.startswith("__")}
    for path, names in imported_files(EDGES, MODULES).items():
        here = part_of(path)
        if here in parts:
            parts[here] |= {part_of(name) for name in names} & set(parts) - {here}
    return drawing(parts)


def with_drawing(text: str) -> str:
    """CONTRIBUTING.md with the drawing of today."""
    begin, end = "<!-- imports: python -m tests.test_architecture -->\n", "\n<!-- end of imports -->"
    head, _, rest = text.partition(begin)
    return head + begin + parts_drawn() + end + rest.partition(end)[2]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.distributed as dist", ["torch.distributed"]),
        ("def f():\n    from torch import distributed, nn", ["torch.distributed", "torch.nn"]),
        ("from ..engines import base", ["kfac_dist.engines.base"]),
        ("from . import a", ["kfac_dist.curvature.a"]),
        ("from .a import b", ["kfac_dist.curvature.a.b"]),
    ],
)
def test_imports_are_found(source: str, found: list[str]) -> None:
    assert list(imports_of(source, "kfac_dist/curvature/factors.py")) == found


def test_allowed_imports_form_no_cycle() -> None:
    below = {part: set(allowed) for part, allowed in MAY_IMPORT.items()}
    while below:
        leaves = {part for part, allowed in below.items() if not allowed}
        assert leaves, f"a cycle among {sorted(below)}"
        below = {part: allowed - leaves for part, allowed in below.items() if part not in leaves}


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d2"}, "d2": {"d"}, "e": set()}
    assert circles(graph) == [["b", "c"], ["d", "d2"]]
    paths = ["kfac_dist/x/__init__.py", "kfac_dist/x/y.py", "kfac_dist/z.py"]
    edges = [(paths[1], "kfac_dist.x.y2"), (paths[2], "kfac_dist.x.y.name"), (paths[2], "torch.nn")]
    assert imported_files(edges, paths) == {paths[0]: set(), paths[1]: {paths[0]}, paths[2]: {paths[1]}}


def test_no_file_imports_itself_by_a_detour() -> None:
    assert circles(imported_files(EDGES, MODULES)) == []


def test_no_folder_is_a_heap() -> None:
    folders = Counter(file.parent.relative_to(ROOT).as_posix() for file in MODULES.values())
    assert {folder: files for folder, files in folders.items() if files > FILES_IN_A_FOLDER} == {}


def test_contributing_draws_the_imports_of_today() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert text == with_drawing(text), "python -m tests.test_architecture draws them anew"


def test_parts_import_only_what_they_may() -> None:
    wrong = []
    for path, name in EDGES:
        if not within(name, "kfac_dist"):
            continue
        here, there = part_of(path), [*name.split("."), "__init__"][1]
        if there not in MAY_IMPORT:  # `from kfac_dist import KFAC`, or a part that the table lacks
            there = "__init__"
        if there != here and there not in MAY_IMPORT.get(here, set()):
            wrong.append(f"{path} imports {name}")
    assert wrong == []


def test_below_training_configurations_are_plain_values() -> None:
    parts = {"curvature", "distributed", "engines", "preconditioner", "optimizers", "reporting"}
    wrong = [
        f"{path} imports {name}"
        for path, name in EDGES
        if part_of(path) in parts
        and within(name, "kfac_dist.config")
        and not any(within(name, plain) for plain in PLAIN_CONFIG)
    ]
    assert wrong == []


def test_nothing_crosses_a_closed_border() -> None:
    wrong = [
        f"{path} imports {name}: {why}"
        for path, name in EDGES
        for start, module, why in NEVER
        if path.startswith(start) and within(name, module)
    ]
    assert wrong == []


def test_optional_packages_have_one_door() -> None:
    wrong = [
        f"{path} imports {name}, which belongs in {' or '.join(doors) or 'users’ code'}"
        for path, name in EDGES
        for module, doors in ONLY.items()
        if within(name, module) and not path.startswith(doors or ("-",))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch._dynamo", ["torch._dynamo"]),
        ("from torch.utils._pytree import tree_leaves", ["torch.utils._pytree._pytree"]),
        ("from torch.nn.modules.batchnorm import _BatchNorm", ["torch.nn.modules.batchnorm._BatchNorm"]),
        ("def f(t):\n    return t._base", ["t._base"]),
        ("torch._C._current_graph_task_id()", ["torch._C._current_graph_task_id", "torch._C"]),
        ("getattr(engine, '_config', None)", ["getattr(engine, '_config', None)"]),
        ("engine.__dict__['_take_model_step']", ["engine.__dict__['_take_model_step']"]),
        ("class C:\n    def f(self, other):\n        return self._x + other._x + other._y", ["other._y"]),
        ("class C:\n    def f(self):\n        return self._optimizer._step", ["self._optimizer._step"]),
        ("torch._foreach_add_(a, b)\nx.__class__\nfrom __future__ import annotations", []),
        ("from kfac_dist.a import _b", []),
    ],
)
def test_private_names_are_found(source: str, found: list[str]) -> None:
    assert list(private_names_in(source)) == found


def test_private_names_of_other_packages_have_one_door() -> None:
    wrong = [
        f"{path} uses {name}: give it a function in kfac_dist/compat/"
        for path, file in MODULES.items()
        if not path.startswith(PRIVATE)
        for name in private_names_in(file.read_text())
    ]
    assert wrong == []


def test_each_package_has_one_module_for_its_private_names() -> None:
    """A module of `compat` is named after the package whose names it uses, and imports no other that has one."""
    doors = {Path(path).stem for path in MODULES if path.startswith(PRIVATE)} - {"__init__"}
    crossing = [
        f"{path} imports {name}"
        for path, name in EDGES
        if path.startswith(PRIVATE) and any(within(name, door) for door in doors - {Path(path).stem, "torch"})
    ]
    assert crossing == []


def test_every_module_says_what_it_is_about() -> None:
    silent = [path for path, file in MODULES.items() if ast.get_docstring(ast.parse(file.read_text())) is None]
    assert silent == []


ASKING = r"(?:What|Who|Where|How|Which|Whose|Whom|Whatever|Whoever)\b"
# An argument, attribute, exception or returned value in a docstring: its description asks.
ENTRY = re.compile(rf"^ +[\w*][\w*, `]*: {ASKING}", re.MULTILINE)
UNNAMED = re.compile(r"\b(?:somebody|someone|nobody|anybody|anyone|whoever)\b")
CODE = {
    str(file.relative_to(ROOT)): file.read_text()
    for folder in ("kfac_dist", "examples", "benchmarks")
    for file in sorted((ROOT / folder).rglob("*.py"))
}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def docstrings(code: str) -> list[str]:
    """Return docstrings, those below attributes among them."""
    statements = (node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Expr))
    return [text.value for text in statements if isinstance(text, ast.Constant) and isinstance(text.value, str)]


def comments(code: str) -> list[str]:
    """Return comments, those of consecutive lines as one."""
    lines = re.findall(r"^ *# .*(?:\n *# .*)*", code, flags=re.MULTILINE)
    return [" ".join(line.strip().removeprefix("# ") for line in block.splitlines()) for block in lines]


def riddles(code: str) -> list[str]:
    """Return what asks in place of naming, or speaks of an unnamed person."""
    texts = docstrings(code)
    return [
        *(text.splitlines()[0] for text in texts if re.match(ASKING, text)),
        *(found.strip() for text in texts for found in ENTRY.findall(text)),
        *(text for text in comments(code) if re.match(ASKING, text) and not text.startswith("Where ")),
        *(text.strip() for text in (*texts, *comments(code)) if UNNAMED.search(text)),
    ]


def test_docstrings_and_comments_name_their_subject() -> None:
    found = [f"{path}: {riddle}" for path, code in CODE.items() for riddle in riddles(code)]
    assert found == [], "begin with a noun or a verb, and name who acts"


@pytest.mark.parametrize(
    "code",
    [
        '"""What a run came to."""',
        'def f(x):\n    """Return x.\n\n    Args:\n        x: How far it is.\n    """',
        'class A:\n    x = 1\n    """Whose it is."""',
        "# Who sends it.\nx = 1",
        "x = 1\n\n# Sent by a rank\n# that nobody asked.",
    ],
)
def test_riddles_are_found(code: str) -> None:
    assert len(riddles(code)) == 1
    assert riddles('"""Return who holds x.\n\nx: the owner\n"""\n# Where x is 0, y counts.\ny = {"What": 1}') == []


def test_headings_of_pages_are_nouns_and_name_their_subject() -> None:
    asking = [
        f"{page.relative_to(ROOT)}: {line}"
        for page in PAGES
        for line in page.read_text().splitlines()
        if re.match(rf"#+ {ASKING}", line) or UNNAMED.search(line)
    ]
    assert asking == []


def test_every_package_is_a_package() -> None:
    folders = {file.parent for file in MODULES.values()}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_no_module_is_named_after_nothing() -> None:
    nothing = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert [path for path, file in MODULES.items() if file.stem in nothing] == []


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["train", "nowhere.yaml"], ["version"], ["submit", "no.yaml"]]
)
def test_what_needs_no_torch_imports_none(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from kfac_dist.cli import main\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n    main()\n"
        "finally:\n    sys.stderr.write('torch' if 'torch' in sys.modules else 'clean')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stderr.endswith("clean"), ended.stderr


if __name__ == "__main__":
    contributing = ROOT / "CONTRIBUTING.md"
    contributing.write_text(with_drawing(contributing.read_text()))
