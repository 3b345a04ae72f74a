"""From a script of slurm/ to one for a certain run: its options and settings filled in, everything else as it is.

Pure: text in, text out.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from kfac_dist.errors import ConfigError
from kfac_dist.slurm.job import SlurmJob, StartedBy

_DIRECTIVES = re.compile(r"(?:^#SBATCH .*\n)+", re.MULTILINE)
_SETTINGS = re.compile(r"^# --- settings[^\n]*\n(.*?)^# --- end of settings\n", re.MULTILINE | re.DOTALL)


def template(started_by: StartedBy) -> str:
    """Return the script that starts ranks this way: packed into an installed package, in slurm/ in a checkout.

    Raises:
        ConfigError: It can't be found.
    """
    name = {StartedBy.TORCHRUN: "train.sbatch", StartedBy.SRUN: "train_srun.sbatch"}[started_by]
    places = (Path(__file__).parent / "scripts" / name, Path(__file__).parents[2] / "slurm" / name)
    for place in places:
        if place.is_file():
            return place.read_text()
    raise ConfigError(f"{name} is neither {places[0]} nor {places[1]}: install kfac_dist again")


def render(
    text: str,
    job: SlurmJob,
    *,
    config: Path,
    run_directory: Path,
    python: str,
    resume: str = "auto",
    sweep: Path | None = None,
    tasks: int = 0,
) -> str:
    """Fill in the script of a run.

    Args:
        text: A script of slurm/.
        job: Its request.
        config: The run's configuration, complete.
        run_directory: Directory of the run's files; `<run_directory>-<task>` in an array.
        python: The interpreter, where there is no container.
        resume: Value of the ranks' `--resume`; empty for the configuration's.
        sweep: A file with overrides, one line a task; None for a job that is no array.
        tasks: Its lines.
    """
    output = run_directory / ("slurm-%A_%a.out" if sweep else "slurm-%j.out")
    directives = job.directives(run_directory.name, output, tasks if sweep else None)
    contained = bool(job.container.image or job.container.apptainer)
    settings = {
        "config": _quoted(config),
        "overrides": "()",  # they are in the configuration
        "run_directory": _quoted(run_directory),
        "sweep": _quoted(sweep or ""),
        "resume": _quoted(resume),
        "ranks_per_node": str(job.ranks),
        "max_restarts": str(job.max_restarts),
        "stop_seconds": str(job.stop_seconds),
        "setup": _quoted(job.setup),
        "python": "python3" if contained else _quoted(python),
        "container_image": _quoted(job.container.image),
        "container_mounts": _quoted(job.container.mounts) if job.container.mounts else "$PWD:$PWD",
        "apptainer_image": _quoted(job.container.apptainer),
    }
    filled = _DIRECTIVES.sub(lambda _: "".join(f"#SBATCH {option}\n" for option in directives), text, count=1)
    block = _SETTINGS.search(filled)
    assert block is not None, "the script has no settings"
    names = [line.partition("=")[0] for line in block[1].splitlines()]
    assert set(names) <= set(settings), f"settings that nothing fills in: {set(names) - set(settings)}"
    lines = "".join(f"{name}={settings[name]}\n" for name in names)
    return filled[: block.start()] + lines + filled[block.end() :]


def _quoted(value: str | Path) -> str:
    return shlex.quote(str(value))
