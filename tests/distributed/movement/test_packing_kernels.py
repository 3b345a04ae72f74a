"""The kernels write what the copies do: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kfac_dist.distributed.movement import packing
from kfac_dist.distributed.movement.packing import pack_symmetric, triangle_numel, unpack_symmetric

SIZES = (1, 2, 3, 4, 7, 8, 31, 32, 33, 64, 97)


def check(device: str) -> int:
    """Compare packed and unpacked values, of every size, layout and precision, with those made by copies on the CPU.

    Returns:
        Comparisons made.
    """
    from kfac_dist.distributed.movement import packing_kernels

    generator = torch.Generator().manual_seed(0)
    compared = 0
    for n in SIZES:
        half = torch.randn(2, n, n, generator=generator)
        whole = half + half.mT
        for dtype in (torch.float32, torch.bfloat16):
            # What packing hands over: the transpose of a matrix whose upper triangle alone is right.
            matrix = whole.triu().mT
            wanted = torch.empty(2, triangle_numel(n), dtype=dtype)
            pack_symmetric(matrix, wanted)
            found = torch.full(wanted.shape, torch.nan, dtype=dtype, device=device)
            packing_kernels.pack(matrix.to(device), found)
            # The interpreter cuts digits off where a GPU rounds to the nearest.
            digit = 0.0 if device == "cuda" or dtype is torch.float32 else 2.0**-7
            torch.testing.assert_close(found.cpu(), wanted, rtol=digit, atol=0.0)
            back = torch.full((2, n, n), torch.nan, device=device)
            packing_kernels.unpack(found, back)
            assert torch.equal(back.cpu(), unpack_symmetric(found.cpu(), n, torch.empty(2, n, n))), (n, dtype)
            compared += 1
    return compared


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu() -> None:
    assert check("cuda") == 2 * len(SIZES)
    matrix = torch.randn(3, 65, 65, device="cuda")
    matrix = matrix + matrix.mT
    packed = torch.empty(3, triangle_numel(65), device="cuda")
    pack_symmetric(matrix, packed)
    assert torch.equal(unpack_symmetric(packed, 65), matrix)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: the extra kernels")
def test_kernels_in_the_interpreter() -> None:
    # A process of its own: Triton reads the variable when a kernel is defined.
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = "from tests.distributed.movement.test_packing_kernels import check; print(check('cpu'))"
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, str(2 * len(SIZES))), ended.stderr


def test_without_triton_a_warning_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kfac_dist.distributed.movement.packing_kernels", raising=False)
    packing.gpu_kernels.cache_clear()
    with pytest.warns(UserWarning, match="pip install triton"):
        assert packing.gpu_kernels() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packing.gpu_kernels() is None  # said once
    packing.gpu_kernels.cache_clear()
