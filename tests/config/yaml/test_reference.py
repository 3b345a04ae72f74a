from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from kfac_dist.cli import app
from kfac_dist.config.schema import Config, Section
from kfac_dist.config.yaml.fields import all_paths, allowed_at
from kfac_dist.config.yaml.load import load_config
from kfac_dist.config.yaml.reference import explain_key, reference_yaml
from kfac_dist.errors import ConfigError


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return result.exit_code, result.output


def test_reference_is_a_run(tmp_path: Path) -> None:
    code, output = invoke("config")
    file = tmp_path / "all.yaml"
    file.write_text(output)

    assert code == 0
    assert output == reference_yaml()
    example = load_config("digits_autoencoder")
    config = load_config(file)
    assert (config.run, config.model, config.data, config.loss) == (
        example.run,
        example.model,
        example.data,
        example.loss,
    )
    assert config.kfac == Config.model_fields["kfac"].get_default(call_default_factory=True)
    assert config.train.steps == example.train.steps
    assert invoke("train", str(file), "--check") == (0, f"{file}: fine\n")


def test_reference_has_every_key_with_a_comment() -> None:
    lines = reference_yaml().splitlines()
    assert max(map(len, lines)) <= 120
    names = sorted(path[-1] for path in all_paths())
    keys = [re.match(r"((?:  |# )*)(\w+):(?: |$)", line) for line in lines]
    keys = [match if match and match[2] in names else None for match in keys]  # prose has colons, too
    assert sorted(match[2] for match in keys if match) == names
    for number, match in enumerate(keys):
        if match:
            above = lines[number - 1].lstrip()
            assert above.startswith("#")
            assert not above.startswith("# ----")


def test_sections_left_out_can_be_taken_in() -> None:
    text = reference_yaml()
    begin = text.index("  # cg:\n")
    lines = text[begin:].partition("\n\n")[0].splitlines()
    section = yaml.safe_load("\n".join(line.replace("  # ", "  ", 1) for line in lines))
    values = {"kfac": {**section, "solver": "cg"}, "optimizer": None}
    whole = {**yaml.safe_load(text), **values}
    config = Config.model_validate(whole)
    assert config.kfac.cg == config.kfac.cg_options == type(config.kfac.cg_options)()


def test_questions_group_every_key_once() -> None:
    grouped: set[type[Section]] = set()
    for path in all_paths():
        allowed = allowed_at(path)
        if allowed is not None and allowed.section is not None and allowed.section.questions:
            grouped.add(allowed.section)
    assert {section.__name__ for section in grouped} == {"CurvatureConfig", "InversionConfig", "DistributionConfig"}
    for section in grouped:
        names = [name for group in section.questions.values() for name in group]
        assert sorted(names) == sorted(section.model_fields)
        assert all(question.endswith("?") for question in section.questions)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (
            "kfac.curvature.fisher",
            "kfac.curvature.fisher: one of empirical, mc, type2, input_only\ndefault: empirical\n\n"
            "Gradients that G is computed from. `mc` and `type2` give the true Fisher and need `likelihood`.",
        ),
        ("run.name", "run.name: text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$\ndefault: none, it must be given\n"),
        ("kfac.cg.damping.value", "kfac.cg.damping.value: a number > 0\ndefault: none, it must be given\n"),
        ("kfac.inversion.splits.fc*.by", "kfac.inversion.splits.fc*.by: one of per_head, per_group or null\n"),
        ("kfac.inversion.damping", "default: 0.003\n\nλ; a number or a schedule over steps"),
        ("compare.adamw.betas", "default: [0.9, 0.999]\n\nOf `adamw`"),
        ("optimizer.betas.0", "optimizer.betas.0: a number >= 0 and < 1"),
        ("model.args.dims", "model.args.dims: any value"),
        ("kfac.newton", "kfac.newton: a section, null by default\n\nSettings of `newton`"),
        (
            "kfac.inversion",
            "kfac.inversion: a section\n\nInversion: the method, its damping, and its intervals.\n\n# ---- How",
        ),
    ],
)
def test_any_key_is_explained(key: str, text: str) -> None:
    assert text in explain_key(key)
    assert invoke("config", key) == (0, explain_key(key) + "\n")


def test_every_key_of_the_schema_is_explained() -> None:
    assert [path for path in all_paths() if not explain_key(".".join(path)).startswith(".".join(path) + ": ")] == []


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("kfac.inversion.dampin", "kfac.inversion.dampin: unknown key; did you mean 'damping'?"),
        ("solver", "solver: unknown key; did you mean kfac.solver or kfac.inversion.solver? Here the keys are run, "),
        ("kfac.solvers.x", "kfac.solvers: unknown key; did you mean 'solver'?"),
        ("train.steps.x", "train.steps.x: unknown key; train.steps has no keys, it is a whole number >= 1 or null"),
        ("", ": unknown key; the keys here are run, "),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(key: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        explain_key(key)
    assert str(refusal.value).startswith(message)
    code, output = invoke("config", key)
    assert (code, output) == (2, f"error: {refusal.value}\n")
