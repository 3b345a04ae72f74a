"""Checkpoints are complete or ignored, keep the newest, fit or say what doesn't, and can't run code."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.errors import CheckpointError
from kfac_dist.training.checkpoints import checkpoint
from kfac_dist.training.checkpoints.checkpoint import MANIFEST, Checkpoints, read_manifest
from kfac_dist.training.checkpoints.reader import SafeReader
from tests.harness import run_ranks


def _state(value: float = 1.0) -> dict[str, object]:
    return {"model": {"a.weight": torch.full((2, 3), value), "a.bias": torch.full((2,), value)}}


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, notices: list[str]) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", 2, SoloCommunicator(), notices.append)


def test_what_was_saved_comes_back(checkpoints: Checkpoints) -> None:
    checkpoints.save(7, _state(3.0) | {"kfac": {"count": 5}}, {"epoch": 2})
    found = checkpoints.newest()
    assert found is not None
    assert (found.step, found.facts) == (7, {"epoch": 2})
    loaded: dict[str, object] = _state() | {"kfac": {"count": 0}}
    checkpoints.load(found, loaded)
    assert loaded["kfac"] == {"count": 5}
    torch.testing.assert_close(loaded["model"], _state(3.0)["model"])


def test_the_newest_few_stay(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 10, 3):
        checkpoints.save(step, _state(), {})
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["step-00000003", "step-00000010"]


def test_a_step_may_be_saved_again(checkpoints: Checkpoints) -> None:
    checkpoints.save(4, _state(1.0), {})
    checkpoints.save(4, _state(2.0), {})
    found = checkpoints.newest()
    assert found is not None
    loaded = _state()
    checkpoints.load(found, loaded)
    torch.testing.assert_close(loaded, _state(2.0))
    assert len(list(checkpoints.directory.iterdir())) == 1


def test_links_and_files_in_the_way_go_and_what_links_lead_to_stays(checkpoints: Checkpoints, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    checkpoints.directory.mkdir()
    folder = checkpoints.directory
    (folder / "step-00000002.writing").symlink_to(elsewhere)
    (folder / "step-00000003.writing").symlink_to(tmp_path / "nowhere")
    (folder / "step-00000004.writing").write_text("a file")
    (folder / "step-00000001.aside").symlink_to(elsewhere)
    (folder / "step-00000001").symlink_to(elsewhere)
    (folder / "step-00000003").symlink_to(tmp_path / "nowhere")

    for step in (2, 3, 4):
        checkpoints.save(step, _state(), {})

    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000004"]
    assert (elsewhere / "precious").read_text() == "mine"
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 4


def test_torn_directories_are_ignored_with_a_line_each(checkpoints: Checkpoints, notices: list[str]) -> None:
    good = checkpoints.save(1, _state(), {})
    checkpoints.keep = 9
    no_manifest, truncated = checkpoints.save(2, _state(), {}), checkpoints.save(3, _state(), {})
    (no_manifest / MANIFEST).unlink()
    data = next(truncated.glob("*.distcp"))
    os.truncate(data, data.stat().st_size - 1)
    (checkpoints.directory / "step-00000004.writing").mkdir()
    found = checkpoints.newest()
    assert found is not None
    assert found.path == good
    assert len(notices) == 3
    assert "step-00000004.writing: not a complete checkpoint" in notices[0]
    assert f"{data.name} has" in notices[1]
    assert "manifest.json is missing" in notices[2]
    checkpoints.save(5, _state(), {})
    assert not list(checkpoints.directory.glob("*.writing"))


def test_nothing_saved_yet_is_no_checkpoint(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"a.weight": (2, 4), "a.bias": (2,)}, r"model.a.weight has shape \(2, 3\), in this run \(2, 4\)"),
        ({"a.weight": (2, 3), "b": (1,), "a.bias": (2,)}, "has no model.b, which this run has"),
    ],
)
def test_another_model_is_refused_by_its_first_misfit(
    checkpoints: Checkpoints, model: dict[str, tuple[int, ...]], message: str
) -> None:
    checkpoints.save(1, _state(), {})
    found = checkpoints.newest()
    assert found is not None
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(found, {"model": {name: torch.ones(shape) for name, shape in model.items()}})


def test_a_manifest_of_another_format_is_refused(checkpoints: Checkpoints) -> None:
    path = checkpoints.save(1, _state(), {})
    manifest = path / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(CheckpointError, match="its format is 99, this version of kfac_dist reads 2"):
        read_manifest(path)
    path = checkpoints.save(1, _state(), {"epoch": 12})
    manifest.write_text(manifest.read_text().replace('"epoch": 12', '"epoch": 13'))
    with pytest.raises(CheckpointError, match=r"damaged, manifest\.json has other contents"):
        read_manifest(path)
    for nothing in ("[]", "[" * 200_000):
        manifest.write_text(nothing)
        with pytest.raises(CheckpointError, match="can't be read"):
            read_manifest(path)
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(CheckpointError, match=r"manifest\.json: is a FIFO, expected a regular file"):
        read_manifest(path)


def test_a_path_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_manifest(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="those are named step-<number>"):
        read_manifest(tmp_path)


def test_damaged_contents_are_found_by_their_hash_and_the_one_before_is_used(
    checkpoints: Checkpoints, notices: list[str]
) -> None:
    good = checkpoints.save(1, _state(), {})
    altered = checkpoints.save(2, _state(2.0), {})
    data = next(altered.glob("*.distcp"))
    contents = bytearray(data.read_bytes())
    contents[len(contents) // 2] ^= 1
    data.write_bytes(contents)
    found = checkpoints.newest()
    assert found is not None
    assert found.path == good
    assert notices == [
        f"ignored: {altered}: damaged, {data.name} has other contents than were written (by its SHA-256)"
    ]
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.verify(read_manifest(altered))
    checkpoints.set_aside(found.step)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == [good.name, f"{altered.name}.aside"]
    checkpoints.keep = 1
    later = checkpoints.save(2, _state(3.0), {})
    assert list(checkpoints.directory.iterdir()) == [later]


def test_training_goes_on_while_a_copy_is_written(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    state, go_on, write = _state(1.0), threading.Event(), checkpoint.save_dcp

    def slow(*args: Any, **kwargs: Any) -> None:
        assert go_on.wait(20)
        write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_dcp", slow)
    checkpoints.save(1, state, {}, wait=False)
    cast(dict[str, Tensor], state["model"])["a.bias"].fill_(9.0)
    assert checkpoints.newest() is None
    go_on.set()
    checkpoints.save(2, _state(2.0), {}, wait=False)  # waits for the first
    checkpoints.finish()
    first = read_manifest(checkpoints.directory / "step-00000001")
    loaded = _state(0.0)
    checkpoints.load(first, loaded)
    torch.testing.assert_close(loaded, _state(1.0))
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def _fill(directory: str) -> list[str]:
    """Runs on every rank: what it says of a disk that fills up, in training's way and in the background."""
    communicator = build_communicator(30.0)
    checkpoints = Checkpoints(Path(directory), 5, communicator)
    checkpoints.save(1, _state(), {})
    big = {"model": {"a.weight": torch.zeros(2**16)}}
    said = []
    for wait in (True, False):
        try:
            checkpoints.save(2, big, {}, wait=wait)
            checkpoints.finish()
        except CheckpointError as error:
            said.append(str(error))
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 1
    checkpoints.save(3, _state(), {})
    checkpoints.close()
    communicator.close()
    return said


def test_a_full_disk_is_one_message_on_every_rank_and_the_older_checkpoint_stays(small_disk: Path) -> None:
    for said in run_ranks(2, _fill, str(small_disk / "checkpoints")):
        assert len(said) == 2
        for line in said:
            assert re.fullmatch(r"rank 0 can't write its part to \S+\.writing: No space left on device", line)
    assert sorted(path.name for path in (small_disk / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


def test_a_table_of_contents_can_not_run_code(checkpoints: Checkpoints) -> None:
    path = checkpoints.save(1, _state(), {})
    found = checkpoints.newest()
    assert found is not None
    (path / ".metadata").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(CheckpointError, match=r"names \w+\.system, which no checkpoint needs"):
        checkpoints.load(found, _state())
    (path / ".metadata").write_bytes(pickle.dumps(torch.Size([1])))
    with pytest.raises(CheckpointError, match=r"\.metadata holds a Size"):
        checkpoints.load(found, _state())


def test_values_can_not_run_code(checkpoints: Checkpoints) -> None:
    path = checkpoints.save(1, {"model": {"a.weight": torch.zeros(2), "a.count": _Bomb()}}, {})
    found = checkpoints.newest()
    assert found is not None
    with pytest.raises(CheckpointError, match=r"made to run code: .*GLOBAL \w+\.system"):
        checkpoints.load(found, {"model": {"a.count": 0}})
    # A tensor's bytes, replaced by somebody who has made the table of contents fit.
    metadata = SafeReader(path).read_metadata()
    bomb = io.BytesIO()
    torch.save(_Bomb(), bomb)
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(bomb.getvalue())
        (path / place.relative_path).write_bytes(bomb.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"made to run code: .*GLOBAL \w+\.system"):
        checkpoints.load(found, {"model": {"a.weight": torch.zeros(2)}})


def _save_and_load_on_ranks(directory: str) -> list[object]:
    communicator = build_communicator(30.0)
    checkpoints = Checkpoints(Path(directory), 2, communicator)
    rank = float(communicator.rank)
    own = {f"rank{communicator.rank}": {"draws": torch.full((3,), rank)}}
    checkpoints.save(1, _state(5.0) | {"rng": own}, {})
    found = checkpoints.newest()
    assert found is not None
    loaded = {"model": _state(0.0)["model"], "rng": {f"rank{communicator.rank}": {"draws": torch.zeros(3)}}}
    checkpoints.load(found, loaded)
    try:
        checkpoints.load(found, {"model": {"a.bias": torch.ones(3 if communicator.rank else 2)}})
    except CheckpointError as error:
        problem = str(error)
    communicator.close()
    return [loaded, problem]


def test_ranks_save_and_load_together_and_agree_on_a_failure(tmp_path: Path) -> None:
    for rank, (loaded, problem) in enumerate(run_ranks(2, _save_and_load_on_ranks, str(tmp_path))):
        torch.testing.assert_close(loaded["model"], _state(5.0)["model"])
        assert loaded["rng"][f"rank{rank}"]["draws"].tolist() == [rank] * 3
        assert "a.weight, which this run lacks" in problem or "a.bias has shape (2,), in this run (3,)" in problem
    assert read_manifest(tmp_path / "step-00000001").step == 1
