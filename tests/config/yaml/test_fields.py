from __future__ import annotations

import pytest

from kfac_dist.config.yaml.fields import Path, all_paths, allowed_at, expand_shorthand


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("train", "batch_size"), "a whole number >= 1"),
        (("train", "epochs"), "a whole number >= 1 or null"),
        (("loss", "ignore_index"), "a whole number"),
        (("optimizer", "momentum"), "a number >= 0 and < 1"),
        (("optimizer", "nesterov"), "true or false"),
        (("optimizer", "betas"), "a list of 2, each a number >= 0 and < 1"),
        (("optimizer", "betas", 1), "a number >= 0 and < 1"),
        (("kfac", "curvature", "include"), "a list of non-empty text"),
        (("kfac", "curvature", "include", 7), "non-empty text"),
        (("kfac", "curvature", "sharing_overrides"), "a mapping whose values are each one of expand, reduce"),
        (("kfac", "curvature", "sharing_overrides", "any.*"), "one of expand, reduce"),
        (("kfac", "update", "kl_clip_lr"), "current or a number > 0"),
        (("kfac", "inversion", "damping", "value"), "a number > 0"),
        (("kfac", "distribution", "grad_worker_fraction"), "a number > 0 and <= 1 or null"),
        (("checkpoint", "resume"), "text"),
        (("model", "args", "anything"), "any value"),
        (("compare", "mine", "lr", "final"), "a number >= 0 or null"),
    ],
)
def test_words_follow_the_types(path: Path, words: str) -> None:
    assert str(allowed_at(path)) == words


@pytest.mark.parametrize(
    "path", [("trian",), ("train", "batch_size", "x"), ("optimizer", "betas", 2), ("data", "x", "y")]
)
def test_paths_outside_of_the_schema_allow_nothing(path: Path) -> None:
    assert allowed_at(path) is None


def test_every_listed_path_exists() -> None:
    paths = list(all_paths())

    assert ("kfac", "inversion", "damping") in paths
    assert len(paths) == len(set(paths))
    assert all(allowed_at(path) is not None for path in paths)


def test_shorthands_expand_only_where_one_is_allowed() -> None:
    assert expand_shorthand(("optimizer", "lr"), 0.1) == {"value": 0.1}
    assert expand_shorthand(("model",), "mlp") == {"name": "mlp"}
    assert expand_shorthand(("run", "seed"), 3) == 3
    assert expand_shorthand(("nowhere",), 3) == 3
