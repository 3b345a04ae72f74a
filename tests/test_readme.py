"""What README.md and the pages of docs/ show is run: a reader who copies it gets what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import kfac_dist
from kfac_dist.cli import app
from kfac_dist.config import schema
from kfac_dist.config.schema import CGConfig, EngineConfig, KFACConfig, NewtonConfig
from kfac_dist.config.yaml.commented import commented_yaml
from kfac_dist.config.yaml.shipped import shipped_file

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = "\n".join([README, *(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))])


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES, flags=re.MULTILINE | re.DOTALL)


def the_block(language: str, mark: str) -> str:
    (found,) = [block for block in blocks(language) if mark in block]
    return found


def run(command: list[str], directory: Path) -> None:
    ended = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr


def test_the_hand_written_loop_runs(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(the_block("python", "# 3: resumes exactly"))

    run([sys.executable, "loop.py"], tmp_path)

    assert (tmp_path / "state.pt").exists()


def test_the_loop_around_cg_runs(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(the_block("python", '"solver": "cg"'))

    run([sys.executable, "loop.py"], tmp_path)

    assert torch.load(tmp_path / "state.pt")["solver"]["started"]


def test_the_options_of_cg_are_shown_as_they_are() -> None:
    shown = yaml.safe_load(the_block("yaml", "solver: cg"))["kfac"]

    assert set(shown["cg"]) == set(CGConfig.model_fields)
    KFACConfig.model_validate(shown)


def test_the_options_of_newton_are_shown_as_they_are() -> None:
    shown = yaml.safe_load(the_block("yaml", "solver: newton"))["kfac"]

    assert set(shown["newton"]) == set(NewtonConfig.model_fields)
    assert NewtonConfig.model_validate(shown["newton"]) == NewtonConfig()
    config = KFACConfig.model_validate(shown)
    assert (config.curvature.factor_every, config.curvature.decay_ramp, config.inversion.inverse_every) == (1, True, 20)


def test_the_ddp_loop_runs_on_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "ddp.py").write_text(the_block("python", "DistributedDataParallel"))

    run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ddp.py"], tmp_path)


def test_the_game_in_ones_own_loop_runs(tmp_path: Path) -> None:
    (tmp_path / "game.py").write_text(the_block("python", "game_field"))

    run([sys.executable, "game.py"], tmp_path)


def test_staged_adoption_selects_layers() -> None:
    names: dict[str, object] = {"KFACConfig": KFACConfig}
    exec(the_block("python", "CurvatureConfig"), names)
    config = names["config"]
    assert isinstance(config, KFACConfig)

    from_yaml = KFACConfig.model_validate(yaml.safe_load(the_block("yaml", "blocks.*.mlp"))["kfac"])

    assert config.curvature.include == from_yaml.curvature.include
    assert config.curvature.exclude == from_yaml.curvature.exclude


def test_the_engine_section_is_one() -> None:
    section = yaml.safe_load(the_block("yaml", "fsdp2:"))["engine"]
    engine = EngineConfig.model_validate(section)
    assert engine.name.zero_stage == 3
    assert engine.deepspeed["zero_optimization"] == {"overlap_comm": True, "offload_optimizer": {"device": "cpu"}}


def test_a_model_of_ones_own_gives_logits() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kfac_dist[hf]'")
    names: dict[str, Any] = {}
    exec(the_block("python", "LlamaForCausalLM"), names)

    model = names["llama"](layers=1, width=16, heads=2, context=8)

    assert model(torch.zeros(2, 8, dtype=torch.long)).shape == (2, 8, 256)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"configs/[a-z0-9_]+\.yaml", PAGES)) - {"configs/mine.yaml"}))
def test_named_configurations_exist(path: str) -> None:
    assert (ROOT / path).exists()


LAUNCH = re.compile(r"^((?:launch/|kfac-dist launch ).*?) *(?:#.*)?$", flags=re.MULTILINE)
LAUNCHES = sorted(set(LAUNCH.findall("\n".join(blocks("sh")))))


@pytest.mark.parametrize("command", LAUNCHES)
def test_launch_commands_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    for folder in ("launch", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "mine.yaml").write_text(commented_yaml(shipped_file("digits_autoencoder"), Path("mine.yaml")))
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    (tmp_path / "mpirun").write_text("#!/bin/sh\n")  # where none is installed: it only says its version
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}{tmp_path}")
    words = [*command.split(), "--dry-run"]
    if words[0] == "kfac-dist":
        words[:1] = [sys.executable, "-m", "kfac_dist"]

    run(words, tmp_path)


def test_named_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"^make ([a-z]+)", "\n".join(blocks("sh")), flags=re.MULTILINE))

    assert {"train", "test", "setup"} <= named
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named)


def test_make_train_stops_as_the_launch_script_does() -> None:
    """Started by torchrun itself, Ctrl-C would show its traceback."""
    words = [
        "make",
        "--no-print-directory",
        "-n",
        "-o",
        "setup",
        "train",
        "NPROC=3",
        "CONFIG=mine.yaml",
        "ARGS=--name mine",
    ]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)

    assert ended.stdout.splitlines()[-1] == (
        "PYTHON=.venv/bin/python launch/torchrun.sh mine.yaml --nproc-per-node 3 --name mine"
    )


TRAININGS = re.findall(r"^make train ([^#\n]*)", "\n".join(blocks("sh")), flags=re.MULTILINE)


@pytest.mark.parametrize("line", sorted({line.strip() for line in TRAININGS} - {""}))
def test_what_make_train_is_given_is_accepted(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict(word.partition("=")[::2] for word in shlex.split(line))
    config = given.get("CONFIG", "configs/digits_autoencoder.yaml").replace("mine", "digits_classifier")
    monkeypatch.chdir(ROOT)

    ended = CliRunner().invoke(app, ["train", config, *given.get("ARGS", "").split(), "--check", "--quiet"])

    assert ended.exit_code == 0, ended.output


def test_the_reference_has_every_public_name_and_section_once() -> None:
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(), flags=re.MULTILINE)
    assert len(listed) == len(set(listed))
    modules = {name for name in listed if (ROOT / f"{name.replace('.', '/')}.py").exists()}
    objects = {name.rpartition(".")[2] for name in listed} - modules
    shown = [getattr(schema, name) for name in dir(schema) if not name.startswith("_")]
    public = [kfac_dist.KFAC, kfac_dist.load_kfac, kfac_dist.save_kfac]
    sections = [kind for kind in shown if isinstance(kind, type) and issubclass(kind, schema.Section)]
    for kind in (*public, *sections):
        if kind is not schema.Section:
            assert kind.__module__ in modules or kind.__name__ in objects, kind


def test_the_site_has_every_page_in_one_group() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    groups = {name: pages for group in site["nav"] for name, pages in group.items()}
    listed = [page if isinstance(page, str) else next(iter(page.values())) for own in groups.values() for page in own]

    assert list(groups) == ["Start", "Use", "Cluster", "Methods", "Reference", "Project"]
    assert listed[:2] == ["index.md", "start.md"]
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(pages | {"index.md", "CHANGELOG.md", "CONTRIBUTING.md"})


def test_the_site_can_be_searched_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'kfac_dist[docs]'")
    pytest.importorskip("latex2mathml", reason="latex2mathml is not installed: pip install 'kfac_dist[docs]'")
    run([sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")], ROOT)

    index = (tmp_path / "site/search/search_index.js").read_text()
    assert "Choosing a strategy" in index
    for page in ("index.html", "methods/newton.html"):
        text = (tmp_path / "site" / page).read_text()
        assert 'class="md-search__input"' in text
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//[^"]*', text)
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in text
    assert "arithmatex" not in text
