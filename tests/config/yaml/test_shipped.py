from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kfac_dist.cli import app
from kfac_dist.config.schema import Section
from kfac_dist.config.yaml import shipped
from kfac_dist.config.yaml.commented import commented_yaml, meaning
from kfac_dist.config.yaml.load import load_config
from kfac_dist.config.yaml.shipped import shipped_file, shipped_names
from kfac_dist.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
NAMES = sorted(file.name.removesuffix(".yaml") for file in CONFIGS.glob("*.yaml") if file.name != "base.yaml")


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without a checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_those_of_the_runs() -> None:
    assert shipped_names() == NAMES
    assert "gpt_1.3b" in NAMES
    assert "base" not in NAMES


@pytest.mark.usefixtures("elsewhere")
def test_a_name_stands_for_the_shipped_file() -> None:
    assert load_config("byte_gpt") == load_config(CONFIGS / "byte_gpt.yaml")
    assert load_config(Path("digits_autoencoder"), ["train.steps=7"]).train.steps == 7


def test_a_file_of_that_name_wins_and_a_folder_does_not(elsewhere: Path) -> None:
    (elsewhere / "byte_gpt").mkdir()
    assert load_config("byte_gpt").run.name == "byte-gpt"

    (elsewhere / "digits_gan").write_text((CONFIGS / "digits_autoencoder.yaml").read_text().replace("include: ", "#"))
    assert load_config("digits_gan").run.name == "digits-autoencoder"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "digits_autoencodr",
            "error: digits_autoencodr: no such file, and no shipped run has that name; did you mean "
            f"'digits_autoencoder'?; there are {', '.join(NAMES)}\n",
        ),
        ("base", "error: base: no such file, and no shipped run has that name; there are bad_start, "),
        ("zzz.yaml", "error: zzz.yaml: no such file, and no shipped run has that name; there are bad_start, "),
        (
            "configs/byte_gpt.yaml",
            "error: configs/byte_gpt.yaml: no such file; the shipped run is named byte_gpt, and `kfac-dist init "
            "byte_gpt` writes its file\n",
        ),
        ("byte_gpt.yaml", "error: byte_gpt.yaml: no such file; the shipped run is named byte_gpt"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [["train"], ["plan"], ["doctor"], ["submit"], ["launch", "--with", "torchrun"]],
    ids=lambda words: words[0],
)
@pytest.mark.usefixtures("elsewhere")
def test_every_command_tells_the_names(command: list[str], name: str, message: str) -> None:
    code, output = invoke(*command, name)

    assert code == 2
    assert output.startswith(message)
    assert len(output.splitlines()) == 1


@pytest.mark.usefixtures("elsewhere")
def test_commands_take_names() -> None:
    assert invoke("train", "digits_autoencoder", "--check") == (0, "digits_autoencoder: fine\n")
    code, output = invoke("plan", "digits_autoencoder")
    assert code == 0
    assert "2 ranks. Inversion load" in output
    code, output = invoke("submit", "byte_gpt", "--dry-run")
    assert code == 0
    assert "#SBATCH --job-name=byte-gpt" in output


@pytest.mark.parametrize("name", NAMES)
def test_init_writes_the_same_run_as_one_file(elsewhere: Path, name: str) -> None:
    code, output = invoke("init", name)
    file = elsewhere / f"{name}.yaml"

    assert (code, output) == (0, f"{name}.yaml: written; check it: kfac-dist train {name}.yaml --check\n")
    assert load_config(file) == load_config(CONFIGS / f"{name}.yaml")
    assert "include:" not in file.read_text()
    assert max(map(len, file.read_text().splitlines())) <= 140


def test_init_comments_every_key() -> None:
    text = commented_yaml(shipped_file("digits_autoencoder"), Path("mine.yaml"))
    lines = text.splitlines()

    assert lines[0].startswith("# The first run of `make train`")
    assert "#   kfac-dist train mine.yaml --check" in text
    keys = [number for number, line in enumerate(lines) if re.match(r" *\w+:", line)]
    bare = [lines[number] for number in keys if not lines[number - 1].lstrip().startswith("#")]
    assert bare == ["  sgd: {name: sgd, lr: 0.05, momentum: 0.9}", "  adamw: {name: adamw, lr: 0.006}"]
    assert "  # Optimizer steps; give this or `epochs`.\n  steps: 300\n" in text


def test_every_key_of_the_schema_has_a_meaning() -> None:
    from kfac_dist.config.yaml.fields import all_paths, allowed_at

    silent = [path for path in all_paths() if not meaning(path)]

    assert silent == []
    assert meaning(("optimizer", "lr", "warmup_steps")) == "Steps until `value` is reached."
    assert meaning(("model", "args", "dims")) == ""
    section = allowed_at(("train",))
    assert section is not None
    assert section.section is not None
    assert issubclass(section.section, Section)


def test_init_replaces_nothing_unless_told_to(elsewhere: Path) -> None:
    file = elsewhere / "digits_autoencoder.yaml"
    file.write_text("mine\n")

    code, output = invoke("init")
    assert (code, output) == (
        2,
        "error: digits_autoencoder.yaml: is there already: give another --out, or --force to replace it\n",
    )
    assert file.read_text() == "mine\n"

    assert invoke("init", "--out", "other.yaml")[0] == 0
    assert load_config(elsewhere / "other.yaml").run.name == "digits-autoencoder"
    assert invoke("init", "--force")[0] == 0
    assert load_config(file).run.name == "digits-autoencoder"
    code, output = invoke("init", "--out", "nowhere/other.yaml")
    assert (code, output) == (2, "error: nowhere/other.yaml: can't be written: No such file or directory\n")


def test_init_lists_the_names_and_refuses_others() -> None:
    code, output = invoke("init", "--list")
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()] == NAMES
    assert "The byte GPT with Block K-FAC" in output

    code, output = invoke("init", "byte_gtp")
    assert code == 2
    assert output.startswith(
        "error: no shipped run is named 'byte_gtp'; did you mean 'byte_gpt'?; there are bad_start, "
    )


def test_a_package_without_its_configurations_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shipped, "__file__", str(tmp_path / "site-packages" / "kfac_dist" / "config" / "yaml" / "shipped.py")
    )

    with pytest.raises(ConfigError, match=r"neither in .*site-packages/kfac_dist/configs nor in .*: install kfac_dist"):
        shipped_names()
