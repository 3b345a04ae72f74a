"""Faults at random moments, and whether the run that comes of it is the run that was never disturbed.

    kill        kill -9 of a rank; torchrun starts the group again
    terminate   SIGTERM to a rank: all save and leave, and the job is started again, as SLURM would
    stop        SIGSTOP of a rank, SIGCONT a second later
    hang        SIGSTOP of a rank until the others give up; then the stopped one is killed
    corrupt     everything is killed, a byte of the newest checkpoint is changed, and the job started again
    truncate    the same, with a file cut short
    full        the disk (a small tmpfs) is filled; the job ends with a message and is started again with room
    resize      the job is killed, or signalled to stop, and started again on another number of ranks

The first four strike at a random step, during the write of a checkpoint, or during an inversion. Every round ends with
a comparison, bit for bit, of all logged losses and of the whole last checkpoint (weights, optimizer, K-FAC, random
generators) with those of an undisturbed run on as many ranks; after `resize`, of all logged losses up to rounding, with
a model that has neither dropout nor statistics of a batch. Recovery is the time from the fault to the first logged step
that the struck run had not logged yet.

    python -m benchmarks.chaos --rounds 30 --seed 0 [--ranks 2] [--engines ddp fsdp2 zero1 zero2 zero3]
                               [--faults kill full …] [--timeout 5] [--out FILE]

`--rounds` are those of each engine; engines take turns.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.chaos_job import (
    EVERY,
    STEPS,
    TIMEOUT_SECONDS,
    Failed,
    Job,
    Outcome,
    alive,
    compare,
    compare_losses,
    last_checkpoint,
    outcome,
    wait_for,
)
from benchmarks.reporting import spread, write
from kfac_dist.config.engine import EngineName

FAULTS = ("kill", "terminate", "stop", "hang", "corrupt", "truncate", "full", "resize")
MOMENTS = ("step", "write", "inversion")
AT_ANY_MOMENT = ("kill", "terminate", "stop", "hang")
DISK_KIB = 2048
# Tolerated difference of a loss by rounding, if the number of ranks changes.
ROUNDING = 1e-3


@dataclass
class Round:
    """A fault of a run, and its outcome.

    Attributes:
        fault: One of `FAULTS`.
        moment: One of `MOMENTS`.
        rank: The rank that it hit.
        at_step: Last logged step before it.
        starts: Number of starts of the job.
        recovery_seconds: From the fault to the first step that had not been logged before.
        seconds: Of the whole round.
        said: Message of the job, if the fault must cause one.
        engine: Under which the run trains.
        ranks_after: Number of ranks afterwards.
        difference: Of the losses from those of the undisturbed run, at most, relative.
        failure: Why the run that came of it is not the undisturbed one; empty if it is.
    """

    fault: str
    moment: str
    rank: int
    at_step: int = 0
    starts: int = 0
    recovery_seconds: float = 0.0
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)
    engine: str = "ddp"
    ranks_after: int = 0
    difference: float = 0.0
    failure: str = ""

    def describe(self) -> str:
        what = f"{self.engine:5s} {self.fault:9s} rank {self.rank} at {self.moment:9s} step {self.at_step:2d}"
        came = f"back after {self.recovery_seconds:.1f} s, {self.failure or 'equal'}"
        return f"{what}, {self.starts} starts, {came} ({self.seconds:.0f} s)"


def play(round_: Round, job: Job, marker: Path, generator: random.Random) -> None:
    """Start the job, strike it, and see it to its end."""
    job.start()
    if round_.moment == "step":
        step = generator.randrange(2 * EVERY, STEPS - EVERY)
        wait_for(lambda: job.step() >= step, job, f"step {step}")
        time.sleep(generator.random() * 2 * 0.01)
    else:
        wait_for(marker.exists, job, f"the {round_.moment}")
    round_.at_step = job.step()
    struck = time.monotonic()
    _strike(round_, job, generator)
    if job.process.poll() is not None:
        job.start()
    wait_for(lambda: job.step() > round_.at_step, job, "the recovery")
    round_.recovery_seconds = time.monotonic() - struck
    if job.wait() != 0:
        raise Failed("the job ended with an error")
    round_.starts = job.starts


def _strike(round_: Round, job: Job, generator: random.Random) -> None:
    match round_.fault:
        case "kill":
            job.strike(round_.rank, signal.SIGKILL)
        case "terminate":
            job.strike(round_.rank, signal.SIGTERM)
            if job.wait() != 0:
                raise Failed("a job that was signalled to stop ended with an error")
            _expect(round_, job, "preempted at step")
        case "stop":
            pid = job.strike(round_.rank, signal.SIGSTOP)
            time.sleep(1.0)
            os.kill(pid, signal.SIGCONT)
        case "hang":
            pid = job.strike(round_.rank, signal.SIGSTOP)
            others = [other for rank in job.ranks if rank != round_.rank and (other := job.pid(rank))]
            wait_for(lambda: not any(alive(other) for other in others), job, "the others to give up")
            os.kill(pid, signal.SIGKILL)
            _expect(round_, job, f"no answer from rank {round_.rank}", "nor does the store answer")
        case "corrupt" | "truncate":
            job.end()
            word = f"ignored: {_damage(round_, job, generator)}"
            job.start()
            wait_for(lambda: word in job.output(), job, "a word about the damaged checkpoint")
            _expect(round_, job, word)
        case "full":
            filler = job.directory / "filler"
            with suppress(OSError), filler.open("wb", buffering=0) as stream:
                while stream.write(bytes(4096)):
                    pass
            job.wait()
            _expect(round_, job, "No space left on device")
            if last_checkpoint(job.run) is None:
                raise Failed("a full disk spoilt all checkpoints")
            filler.unlink()
        case "resize":
            if generator.randrange(2):
                job.end()
            else:
                job.strike(round_.rank, signal.SIGTERM)
                if job.wait() != 0:
                    raise Failed("a job that was signalled to stop ended with an error")
            round_.ranks_after = generator.choice([ranks for ranks in (1, 2, 3) if ranks != len(job.ranks)])
            job.ranks = range(round_.ranks_after)


def _damage(round_: Round, job: Job, generator: random.Random) -> Path:
    """Damage a file of the newest checkpoint, and return that checkpoint's directory."""
    newest = last_checkpoint(job.run)
    if newest is None:
        raise Failed("there is no checkpoint to damage")
    victim = generator.choice([path for path in sorted(newest.path.iterdir()) if path.stat().st_size])
    if round_.fault == "truncate":
        os.truncate(victim, generator.randrange(victim.stat().st_size))
        return newest.path
    contents = bytearray(victim.read_bytes())
    contents[generator.randrange(len(contents))] ^= 1 << generator.randrange(8)
    victim.write_bytes(contents)
    return newest.path


def _expect(round_: Round, job: Job, *texts: str) -> None:
    lines = [line.strip() for line in job.output().splitlines() if any(text in line for text in texts)]
    if not lines:
        raise Failed(f"the job did not say {' or '.join(texts)!r}")
    round_.said.append(lines[0].replace(str(job.directory), "…")[:600])


@contextmanager
def place(parent: Path, name: str, *, small: bool) -> Iterator[Path]:
    """Yield a directory; a small one is a file system of its own, which needs root."""
    directory = parent / name
    directory.mkdir()
    if small:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "none", str(directory)], check=True)
    try:
        yield directory
    finally:
        if small:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)
        shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True)
class Play:
    """The common part of all rounds of one engine.

    Attributes:
        parent: Parent of the rounds' directories.
        engine: Under which runs train.
        ranks: Number of ranks.
        timeout_seconds: Seconds that ranks wait for each other.
    """

    parent: Path
    engine: str
    ranks: int
    timeout_seconds: float

    def job(self, directory: Path, log: Path, fault: str, restarts: int, environment: dict[str, str]) -> Job:
        """Return the job of a round, or of the undisturbed run that it is compared with."""
        sections: dict[str, dict[str, object]] = {"engine": {"name": self.engine}}
        if fault == "resize":
            sections["model"] = {"args": {"same_anywhere": True}}
        return Job(directory, log, self.ranks, restarts, environment, sections, self.timeout_seconds)

    def undisturbed(self, fault: str) -> Outcome:
        """Return the outcome of an undisturbed run."""
        name = f"undisturbed-{self.engine}-{fault}"
        with place(self.parent, name, small=False) as directory:
            job = self.job(directory, self.parent / f"{name}.txt", fault, 0, {})
            job.start()
            if job.wait() != 0:
                raise Failed(job.output())
            return outcome(job.run)

    def round(self, index: int, fault: str, generator: random.Random, reference: Outcome) -> Round:
        """Play one round in a directory of its own, and compare."""
        began = time.monotonic()
        moment = generator.choice(MOMENTS) if fault in AT_ANY_MOMENT else "step"
        round_ = Round(fault, moment, generator.randrange(self.ranks), engine=self.engine, ranks_after=self.ranks)
        marker, log = self.parent / f"marker-{index}", self.parent / f"output-{index}.txt"
        environment = {
            "CHAOS_PAUSE": moment,
            "CHAOS_MARKER": str(marker),
            "CHAOS_RANK": str(round_.rank),
            "CHAOS_HALF": str(generator.randrange(2)),
        }
        with place(self.parent, f"round-{index}", small=fault == "full") as directory:
            job = self.job(directory, log, fault, 0 if fault == "full" else 2, environment)
            try:
                play(round_, job, marker, generator)
                if fault == "resize":
                    round_.difference = compare_losses(job.run, reference, ROUNDING)
                else:
                    compare(job.run, reference)
            except Failed as failure:
                round_.failure = str(failure)
                print(log.read_text()[-4000:], file=sys.stderr)
            finally:
                job.end()
        round_.seconds = round(time.monotonic() - began, 2)
        return round_


def main() -> None:
    """Play the rounds; exit with 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=[str(name) for name in EngineName], default=["ddp"])
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SECONDS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if "full" in arguments.faults and os.geteuid() != 0:
        parser.error("the fault full mounts a small file system, which needs root: leave it out with --faults")
    generator = random.Random(arguments.seed)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as parent:
        plays = [Play(Path(parent), engine, arguments.ranks, arguments.timeout) for engine in arguments.engines]
        references: dict[tuple[str, bool], Outcome] = {}
        for index in range(arguments.rounds * len(plays)):
            play_, turn = plays[index % len(plays)], index // len(plays)
            # In turn, so that every fault has its share; when and whom it strikes is chance.
            fault = arguments.faults[turn % len(arguments.faults)]
            key = (play_.engine, fault == "resize")
            if key not in references:
                references[key] = play_.undisturbed(fault)
            rounds.append(play_.round(index, fault, generator, references[key]))
            print(f"{index + 1:3d}  {rounds[-1].describe()}", flush=True)
            # After every round: an interrupted benchmark leaves its results.
            settings = vars(arguments) | {"out": None, "rounds_played": len(rounds)}
            path = write("chaos", arguments.out, settings, summary(rounds))
    failed = sum(bool(round_.failure) for round_ in rounds)
    print(f"{len(rounds) - failed} of {len(rounds)} rounds ended in the undisturbed run: {path}")
    sys.exit(1 if failed else 0)


def summary(rounds: list[Round]) -> dict[str, object]:
    good = [round_ for round_ in rounds if not round_.failure]
    faults = sorted({round_.fault for round_ in good})
    engines = list(dict.fromkeys(round_.engine for round_ in rounds))
    return {
        "rounds": len(rounds),
        "equal": len(good),
        "equal_bit_for_bit": sum(round_.fault != "resize" for round_ in good),
        "by_engine": {e: [sum(r.engine == e for r in good), sum(r.engine == e for r in rounds)] for e in engines},
        "recovery_seconds": {f: spread([r.recovery_seconds for r in good if r.fault == f]) for f in faults},
        "each": [asdict(round_) for round_ in rounds],
    }


if __name__ == "__main__":
    main()
