from __future__ import annotations

import pytest
import torch

from kfac_dist.config.schema import EngineConfig, Target
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.curvature.blocks import find_blocks
from kfac_dist.planning import work
from kfac_dist.planning.job import Model, PlannedRun, StepKind
from kfac_dist.planning.machines.hardware import Hardware, load_hardware
from kfac_dist.planning.rows import count_rows
from kfac_dist.tasks import build_model

CPU = load_hardware("cpu-gloo")


def planned(size: int, **sections: object) -> PlannedRun:
    with torch.device("meta"):
        model = build_model(Target(name="autoencoder", args={"dims": [64, 12, 4]}))
    config = parse_kfac(sections)
    blocks = find_blocks(model, config.curvature).blocks
    rows, unknown = count_rows(model, blocks, Target(name="digits", args={"target": "input"}))
    assert unknown == ""
    return PlannedRun.of(Model(blocks, {}, rows), config, EngineConfig(), size, size)


def test_flops_are_those_of_the_formulas() -> None:
    job = planned(1)
    shapes = [(65, 12), (13, 4), (5, 12), (13, 64)]  # columns of A with the bias, of G
    refresh = StepKind(measured=(0,), diagonal=True, moments=False, slots=(0,))
    assert work.statistics(job, CPU, 10).flops == 10 * sum(a * a + g * g for a, g in shapes)
    assert work.inversion(job, CPU, refresh, 0).flops == sum(a**3 + g**3 for a, g in shapes)
    assert work.preconditioning(job, CPU, 0).flops == sum(2 * a * g * (a + g) for a, g in shapes)


def test_owners_share_the_inversion_and_the_preconditioning() -> None:
    alone, job = planned(1), planned(4, distribution={"placement": "owner", "assignment": "balanced"})
    refresh = StepKind(measured=(0,), diagonal=True, moments=False, slots=(0,))
    split = sum(work.inversion(job, CPU, refresh, rank).flops for rank in range(4))
    assert split == work.inversion(alone, CPU, refresh, 0).flops
    whole = work.preconditioning(alone, CPU, 0).flops
    assert sum(work.preconditioning(job, CPU, column).flops for column in range(4)) == pytest.approx(whole)


def test_rows_of_tokens_and_pixels_are_counted_without_memory() -> None:
    with torch.device("meta"):
        gpt = build_model(Target(name="byte_gpt", args={"layers": 1, "width": 8, "heads": 2, "context": 6}))
        resnet = build_model(Target(name="resnet20", args={}))
    blocks = find_blocks(gpt, parse_kfac({}).curvature).blocks
    rows, _ = count_rows(gpt, blocks, Target(name="token_file", args={"path": "nowhere.bin", "context": 6}))
    assert set(rows.values()) == {6.0}
    assert set(rows) == {block.name for block in blocks}
    blocks = find_blocks(resnet, parse_kfac({}).curvature).blocks
    rows, _ = count_rows(resnet, blocks, Target(name="digits_image", args={}))
    assert {32.0**2, 16.0**2, 8.0**2, 1.0} == set(rows.values())
    _, unknown = count_rows(resnet, blocks, Target(name="digits", args={}))
    assert "can't be called without memory" in unknown


def test_ranks_that_share_cores_finish_later() -> None:
    crowded = Hardware.model_validate(CPU.model_dump() | {"crowding": {2: 1.0, 4: 2.0}})
    assert work.finishing([3.0], crowded) == pytest.approx(3.0)
    assert work.finishing([3.0, 3.0, 3.0, 3.0], crowded) == pytest.approx(6.0)
    assert work.finishing([1.0, 1.0, 1.0, 3.0], crowded) == pytest.approx(2.0 + 2.0)  # then one is alone
