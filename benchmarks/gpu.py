"""Cost of K-FAC on one GPU: ResNet-50, BERT-large and GPT-2 in bf16 autocast, on random data.

For each model, over one window of 100 steps (statistics every 10, inverses every 100; NCCL with one rank): the step of
the bare optimizer; with K-FAC, everything refreshed in one step; layers taking turns and solved beside training; the
first with inverses in bfloat16, and with a quarter of the rows on top. Steps are timed by events between them, and
phases are read after the window: the program waits for nothing inside of it, and K-FAC for one flag in a step that
refreshes. Phases are compared with what they can't do without (`roofline`); memory is the allocator's peak. Then the
solvers, from n = 512 to 8192.

Needs torch, numpy, pydantic and PyYAML, and this directory; torch 2.6 and later.

    python -m benchmarks.gpu [--device cuda|cpu] [--small] [--models …] [--skip-solvers] [--out FILE]
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:  # the machine may hold no more than this program needs, or less
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from benchmarks.clock import Marks, synchronize
    from benchmarks.gpu_models import LARGE, SMALL, GPUWorkload
    from benchmarks.gpu_solvers import compare
    from benchmarks.reporting import RESULTS, write
    from benchmarks.roofline import ceilings, rows_of, work
    from kfac_dist import KFAC
    from kfac_dist.curvature.gram import multiplies_halves
except ModuleNotFoundError as error:
    package = {"yaml": "PyYAML"}.get(error.name or "", error.name)
    sys.exit(f"benchmarks.gpu needs {package}, which this Python hasn't: pip install {package}")

FACTOR_EVERY, INVERSE_EVERY = 10, 100
BARE = "bare optimizer"
VARIANTS: dict[str, dict[str, Any]] = {
    "all in one step": {},
    "turns, solved beside": {"curvature": {"stagger": 10}, "inversion": {"stagger": 100, "inverse_lag": 10}},
    "bf16 inverses": {"inversion": {"inverse_dtype": "bfloat16"}},
    "bf16 inverses, a quarter of the rows": {
        "inversion": {"inverse_dtype": "bfloat16"},
        "curvature": {"sample_fraction": 0.25},
    },
}
SIZES = [512, 1024, 2048, 4096, 8192]
SMALL_SIZES = [64, 128, 256]
# Occurrences of a phase in a window, if everything is refreshed in one step.
_TIMES = {
    "statistics": INVERSE_EVERY // FACTOR_EVERY,
    "averaging": INVERSE_EVERY // FACTOR_EVERY,
    "inversion": 1,
    "preconditioning": INVERSE_EVERY,
}
_MEASURED_AS = {"averaging": "reduction"}


def sections(workload: GPUWorkload, variant: str) -> dict[str, Any]:
    changes = VARIANTS[variant]
    return {
        "curvature": {"factor_every": FACTOR_EVERY, **workload.curvature, **changes.get("curvature", {})},
        "inversion": {
            "inverse_every": INVERSE_EVERY,
            "early_refresh": 0,
            "damping": 0.01,
            **changes.get("inversion", {}),
        },
    }


class Stepper:
    """A model on the device that takes steps, with K-FAC or without."""

    def __init__(self, workload: GPUWorkload, variant: str | None, device: torch.device) -> None:
        torch.manual_seed(0)
        self.workload, self.device = workload, device
        self.bare = workload.build().to(device)
        self.model = DistributedDataParallel(self.bare, gradient_as_bucket_view=True)
        self.optimizer = workload.optimizer(self.bare.parameters())
        self.inputs = workload.inputs().to(device)
        self.kfac: KFAC | None = None
        if variant is not None:
            self.kfac = KFAC(self.model, sections(workload, variant), optimizer=self.optimizer)

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.workload.loss(self.model(self.inputs), self.inputs)
        loss.backward()
        if self.kfac is not None:
            self.kfac.step()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def warm_up(self) -> None:
        """Take the steps that allocate and choose kernels, and stand at the start of a window."""
        for _ in range(3):
            self.step()
        if self.kfac is not None:
            self.kfac.steps = INVERSE_EVERY - 1
            self.step()
            self.kfac.monitor.phases.enabled = True

    def window(self) -> list[float]:
        """Take one window of steps and return the seconds of each."""
        marks = Marks(self.device)
        synchronize(self.device)
        marks.mark()
        for _ in range(INVERSE_EVERY):
            self.step()
            marks.mark()
        return marks.seconds()


def summary(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in _SHARES.items()}
    return {"mean": sum(ordered) / len(ordered), **at, "max": ordered[-1], "p99/p50": at["p99"] / at["p50"]}


_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.98}  # of 100 steps the 99th: one is longer


def measure(workload: GPUWorkload, device: torch.device, rates: dict[str, float]) -> dict[str, Any]:
    """Time the bare optimizer and every variant, one after the other: each has the device to itself."""
    result: dict[str, Any] = {"shape": workload.shape, "variants": {}}
    bare = 0.0
    for variant in (None, *VARIANTS):
        gc.collect()  # the last one's model and its hooks hold each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        stepper = Stepper(workload, variant, device)
        stepper.warm_up()
        seconds = stepper.window()
        bare = bare or sum(seconds) / len(seconds)
        row: dict[str, Any] = {"seconds": summary(seconds), "step_seconds": [round(value, 6) for value in seconds]}
        row["added_to_bare"] = row["seconds"]["mean"] / bare - 1
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        if stepper.kfac is not None:
            row |= phases(stepper, rates, fractions=variant == "all in one step")
            stepper.kfac.remove()
        result["variants"][variant or BARE] = row
        print(
            f"{workload.shape}, {variant or BARE}: {row['seconds']['mean'] * 1000:.1f} ms, "
            f"{row['added_to_bare']:+.1%}, p99/p50 {row['seconds']['p99/p50']:.2f}",
            flush=True,
        )
        del stepper
    return result


def phases(stepper: Stepper, rates: dict[str, float], *, fractions: bool) -> dict[str, Any]:
    """Return each phase's seconds in the window and, if phases don't overlap, its share of the roofline.

    Solving beside training takes no time of the training stream, and isn't among them.
    """
    kfac = stepper.kfac
    assert kfac is not None
    taken = {str(phase): seconds for phase, seconds in kfac.monitor.phases.seconds().items()}
    if not fractions:
        return {"phase_seconds": taken}
    roofline = {}
    for phase, needed in work(kfac, rows_of(kfac, stepper.bare, stepper.inputs)).items():
        measured = taken[_MEASURED_AS.get(phase, phase)] / _TIMES[phase]
        least = needed.seconds(rates[f"matmul_{multiplied(phase, stepper.device)}_flops"], rates["copy_bytes"])
        roofline[phase] = {
            "flops": needed.flops,
            "bytes": needed.bytes,
            "seconds": measured,
            "least_seconds": least,
            "fraction": least / measured if measured else None,
        }
    return {"phase_seconds": taken, "roofline": roofline}


def multiplied(phase: str, device: torch.device) -> str:
    """Return the dtypes of a phase's products, with rows in bfloat16 and everything else in fp32."""
    return "bfloat16" if phase == "statistics" and multiplies_halves(device) else "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes, to try the program")
    parser.add_argument("--models", nargs="+", choices=list(LARGE), default=list(LARGE))
    parser.add_argument("--skip-solvers", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch sees no GPU here; --device cpu --small tries the program without one")
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{directory}/rendezvous",
            rank=0,
            world_size=1,
        )
        rates = ceilings(device, small=arguments.small)
        workloads = SMALL if arguments.small else LARGE
        results: dict[str, Any] = {"ceilings": rates}
        results["models"] = {name: measure(workloads[name], device, rates) for name in arguments.models}
        if not arguments.skip_solvers:
            results["solvers"] = compare(device, SMALL_SIZES if arguments.small else SIZES, repeats=3)
        dist.destroy_process_group()
    name = ("gpu_small" if arguments.small else "gpu") + ("_on_cpu" if device.type == "cpu" else "")
    settings = {
        "device": arguments.device,
        "small": arguments.small,
        "autocast": "bfloat16",
        "factor_every": FACTOR_EVERY,
        "inverse_every": INVERSE_EVERY,
        "variants": VARIANTS,
        "ceiling": f"matmul_float32_flops; statistics: matmul_{multiplied('statistics', device)}_flops",
    }
    print(write(name, arguments.out or RESULTS / f"{name}.json", settings, results))


if __name__ == "__main__":
    main()
