"""The registered transform of `examples/extensions/transform.py` beside an optimizer's momentum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from examples.extensions.transform import HeavyBall
from kfac_dist import KFAC
from kfac_dist.cli.configuration import check_targets
from kfac_dist.config.yaml.load import dump_yaml, load_config
from kfac_dist.errors import ConfigError
from kfac_dist.extensions import ExtensionError, Transform, register_transform
from tests.extensions.parts import ONE_AND_TWO, OPTIONS, RATE, batches, linear_model, run_file
from tests.harness import run_ranks

ONE_REFRESH = {"inversion": {"inverse_every": 100, "early_refresh": 0, "damping": 0.05}}


def with_momentum(transforms: dict[str, Any], momentum: float) -> dict[str, Tensor]:
    """Parameters after five steps with the inverses of the first; what is fixed and linear commutes with momentum."""
    model = linear_model()
    wrapped = DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=momentum)
    distribution = {"placement": "owner"} if dist.get_world_size() > 1 else {}
    options = {**OPTIONS, **ONE_REFRESH, "distribution": distribution}
    kfac = KFAC(wrapped, {**options, "update": {"kl_clip": None, "transforms": transforms}})
    for inputs, labels in batches(5):
        cross_entropy(wrapped(inputs), labels).backward()
        kfac.step()
        optimizer.step()
        optimizer.zero_grad()
    momenta = kfac.state_dict().get("transforms", {})
    kfac.remove()
    return {**{name: p.detach() for name, p in model.named_parameters()}, **{k: v[M] for k, v in momenta.items()}}


M = "heavy_ball.momentum"


def both_momenta() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return with_momentum({}, 0.9), with_momentum({"heavy_ball": {"decay": 0.9}}, 0.0)


@ONE_AND_TWO
def test_the_transform_is_the_momentum_of_an_optimizer_behind_a_fixed_inverse(ranks: int) -> None:
    for wanted, found in run_ranks(ranks, both_momenta):
        for name, theirs in wanted.items():
            torch.testing.assert_close(found[name], theirs, rtol=1e-9, atol=1e-11)
        assert {name: tuple(found[name].shape) for name in ("0", "2")} == {"0": (1, 6, 6), "2": (1, 3, 7)}
        assert bool(found["0"].any())


class Stateless(Transform):
    """Lacks its method."""


@pytest.mark.parametrize(
    ("name", "transform", "said"),
    [
        ("heavy_ball", HeavyBall, "the name 'heavy_ball' is taken, as are "),
        ("inverse", HeavyBall, "the name 'inverse' is taken, as are "),
        ("Own", HeavyBall, "found the name 'Own'; expected lower-case letters, digits and '_'"),
        ("own", Stateless, "Stateless lacks methods: write apply"),
        ("own", dict, "dict must derive from kfac_dist.extensions.Transform"),
        ("own", 5, "found 5 for 'own'; expected a class that derives from Transform"),
    ],
)
def test_no_transform_is_refused(name: str, transform: Any, said: str) -> None:
    with pytest.raises(ExtensionError) as error:
        register_transform(name, transform, api_version=1)
    assert str(error.value).startswith(f"register_transform: {said}")
    assert "\n" not in str(error.value)
    with pytest.raises(ExtensionError, match="found api_version=2, this kfac_dist has 1"):
        register_transform("own", HeavyBall, api_version=2)


def test_a_transform_is_chosen_and_checked_in_a_run(tmp_path: Path) -> None:
    path = run_file(tmp_path, "examples.extensions.transform")
    config = load_config(path, ["kfac.update.transforms={heavy_ball: {decay: 0.5}}"])
    check_targets(config)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_yaml(config))
    assert load_config(resolved) == config
    for key, value, said in [
        ("heavy_bal", "{}", "found 'heavy_bal'; did you mean 'heavy_ball'?; registered by the modules under"),
        ("heavy_ball", "null", "kfac.update.transforms.heavy_ball: found null, expected a mapping"),
    ]:
        with pytest.raises(ConfigError) as error:
            load_config(path, [f"kfac.update.transforms={{{key}: {value}}}"])
        assert said in str(error.value)
    wrong = load_config(path, ["kfac.update.transforms={heavy_ball: {dcay: 0.5}}"])
    with pytest.raises(ConfigError, match=r"transforms\.heavy_ball: got an unexpected keyword argument 'dcay'"):
        check_targets(wrong)
