from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kfac_dist.config.schema import DType
from kfac_dist.errors import ConfigError
from kfac_dist.planning.machines.hardware import Curve, Hardware, load_hardware, profiles


def test_curves_are_straight_in_logarithms() -> None:
    cubic = Curve({2: 8.0, 10: 1000.0})
    assert cubic.at(5) == pytest.approx(125.0)
    assert cubic.at(20) == pytest.approx(8000.0)  # and go on beyond what is known
    assert cubic.within(20) == pytest.approx(1000.0)
    assert Curve({3: 7.0}).at(1e6) == pytest.approx(7.0)


def test_powers_of_two_speak_for_themselves_where_other_sizes_are_known() -> None:
    cubic = {n: n**3.0 for n in (3, 9, 33, 129, 513)}
    curve = Curve({**cubic, 256: 2 * 256**3.0})
    assert curve.at(256) == pytest.approx(2 * 256**3)
    assert curve.at(200) == pytest.approx(200**3)
    assert Curve({2: 8.0, 4: 64.0}).at(3) == pytest.approx(27.0)  # nothing else is known


@pytest.mark.parametrize("name", profiles())
def test_profiles_say_that_they_are_no_measurement_and_where_they_are_from(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name
    assert hardware.kind == "datasheet"
    assert any("datasheet" in note or "specification" in note for note in hardware.notes)
    assert any(note.startswith("assumed:") for note in hardware.notes)
    # Nothing exceeds its peak, and more work takes longer.
    rates = [hardware.gram_seconds(n, n) for n in (32, 256, 2048)]
    assert rates == sorted(rates)
    for eigen in (False, True):
        solves = [hardware.solve_seconds(n, 1, eigen=eigen) for n in (64, 512, 4096)]
        assert solves == sorted(solves)
    assert hardware.solve_seconds(64, 10, eigen=False) < 10 * hardware.solve_seconds(64, 1, eigen=False)
    assert hardware.product_seconds(256, 256, 256, DType.BFLOAT16) > 0  # also where a profile has no bf16


def test_a_file_of_measurements_is_read_as_it_was_written(tmp_path: Path) -> None:
    hardware = load_hardware("cpu-gloo")
    file = tmp_path / "measured.json"
    file.write_text(hardware.model_dump_json())
    assert load_hardware(str(file)) == hardware


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": None}, "gram: input should be a valid dictionary"),
        ({"gram": {"64": -1.0}}, "gram.64: input should be greater than 0"),
        ({"intra": {"latency": 0.0}}, "intra.bandwidth: field required"),
        ({"collectives": {"all_reduce": {"1": {"64": 1.0}}}}, "collectives.all_reduce.1"),
        ({"speed": 1}, "speed: extra inputs are not permitted"),
        ({"format": 2}, "format: input should be 1"),
    ],
)
def test_what_no_machine_has_is_refused_by_its_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(json.loads(load_hardware("cpu-gloo").model_dump_json()) | change))
    with pytest.raises(ConfigError) as caught:
        load_hardware(str(file))
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_torn_and_missing_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    with pytest.raises(ConfigError, match="can't be read"):
        load_hardware(str(file))
    file.write_text(load_hardware("cpu-gloo").model_dump_json()[:-40])
    with pytest.raises(ConfigError, match="is cut off, or no json at all"):
        load_hardware(str(file))
    file.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="holds list, expected a mapping"):
        load_hardware(str(file))
    with pytest.raises(ConfigError, match="did you mean 'h100-ib400'"):
        load_hardware("h100-ib40")


def test_files_without_an_end_are_refused(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text("a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 25)))
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    (tmp_path / "large.json").write_text(" " * 300_000)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name, message in (
        ("bomb.yaml", r"bomb.yaml:\d+: more than 20,000 values"),
        ("fifo.json", "fifo.json: is a FIFO, expected a regular file"),
        ("device.json", "device.json: is a device, expected a regular file"),
        ("large.json", "large.json: has 300,000 bytes, more than"),
        ("deep.json", "is cut off, or no json at all"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_hardware(str(tmp_path / name))


def test_crowding_slows_ranks_of_a_node_down() -> None:
    hardware = Hardware.model_validate(load_hardware("cpu-gloo").model_dump() | {"crowding": {2: 1.0, 4: 2.0}})
    assert [hardware.slower(active) for active in (1, 2, 4)] == pytest.approx([1.0, 1.0, 2.0])
