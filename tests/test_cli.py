from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kfac_dist.training.run
from kfac_dist.cli import app, exits
from kfac_dist.config.schema import Config, Likelihood
from kfac_dist.errors import CollectiveError, ConfigError
from kfac_dist.training import TrainResult

# base.yaml holds what the others share; it is no run by itself.
SHIPPED = [file for file in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")) if file.name != "base.yaml"]

RUN = """\
run: {name: mine, directory: DIRECTORY}
model:
  name: autoencoder
  args: {dims: [64, 12, 4]}
data:
  name: digits
  args: {target: input}
loss: {name: sigmoid_cross_entropy}
optimizer: {lr: 0.01}
train: {batch_size: 64, steps: 3}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(RUN.replace("DIRECTORY", str(tmp_path / "runs")))
    return str(file)


@dataclass
class Recorder:
    """Stands for `training.run.train`: notes its call, or raises."""

    raises: BaseException | None = None
    config: Config | None = None
    options: dict[str, Any] | None = None

    def __call__(self, config: Config, **options: Any) -> TrainResult:
        self.config, self.options = config, options
        if self.raises is not None:
            raise self.raises
        return TrainResult(Path("runs") / config.run.name, ())


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(kfac_dist.training.run, "train", recorder)
    monkeypatch.setattr(exits, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(exits.signal, "signal", lambda *_: None)
    return recorder


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_view_is_shown_or_hidden(run_file: str, recorder: Recorder) -> None:
    code, output = invoke("train", run_file, "--live", "--quiet")
    assert (code, recorder.config) == (2, None)
    assert output == "error: --live shows progress and --quiet hides it: leave one of them out\n"
    assert invoke("train", run_file, "--live", "--quiet", "--check") == (0, "")  # what `make train` checks with
    recorder.raises = ConfigError("enough")
    invoke("train", run_file, "--live")
    assert recorder.options is not None
    assert recorder.options["live"]


def test_train_hands_over_a_resolved_configuration(
    run_file: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "mine.yaml", "train.steps=7", "--overwrite", "--resume", "never", "--resume=auto"]
    monkeypatch.setattr(sys, "argv", ["kfac-dist", *words])
    code, output = invoke(
        "train", run_file, "train.steps=7", "--compare", "--quiet", "--name", "it's", "kfac.inversion.damping=1e-2"
    )
    assert code == 2
    assert 'command line (--name): run.name: found "it\'s"' in output

    code, _ = invoke("train", run_file, "train.steps=7", "--compare", "--quiet", "--name", "other", "--resume", "auto")

    assert code == 0
    assert recorder.options == {
        "compare": True,
        "quiet": True,
        "live": False,
        "overwrite": False,
        "go_on": "kfac-dist train mine.yaml train.steps=7 --resume auto",
        "on_lost": exits.insist,
        "on_second_interrupt": exits.end_at_once,
    }
    assert recorder.config is not None
    assert (recorder.config.run.name, recorder.config.train.steps) == ("other", 7)
    assert recorder.config.checkpoint.resume == "auto"
    assert recorder.config.kfac.curvature.likelihood is Likelihood.BERNOULLI


def test_options_win_over_overrides(run_file: str, recorder: Recorder) -> None:
    assert invoke("train", run_file, "run.name=a", "--name", "b", "--quiet")[0] == 0
    assert recorder.config is not None
    assert recorder.config.run.name == "b"


def torchrun(rank: int, local_rank: int) -> dict[str, str]:
    places = {"RANK": rank, "WORLD_SIZE": 6, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29500}
    return {"MASTER_ADDR": "localhost"} | {name: str(value) for name, value in places.items()}


@pytest.mark.parametrize(
    ("error", "environment", "code", "output"),
    [
        (ConfigError("key: wrong\nother: wrong"), {}, 2, "error: key: wrong\nerror: other: wrong\n"),
        (ConfigError("key: wrong"), torchrun(rank=4, local_rank=0), 2, "error: key: wrong\n"),
        (ConfigError("key: wrong"), torchrun(rank=5, local_rank=1), 2, ""),
        (ConfigError("key: wrong"), {"PMI_RANK": "5", "PMI_SIZE": "6", "MPI_LOCALRANKID": "1"}, 2, ""),
        (ConfigError("RANK: wrong"), {"RANK": "1"}, 2, "error: RANK: wrong\n"),
        (CollectiveError("lost"), torchrun(rank=1, local_rank=1), 2, "error [rank 1]: lost\n"),
        (CollectiveError("lost"), {"PMI_RANK": "1", "PMI_SIZE": "2"}, 2, "error [rank 1]: lost\n"),
        (CollectiveError("lost"), {}, 2, "error: lost\n"),
        (KeyboardInterrupt(), {}, 130, ""),
    ],
)
def test_errors_have_codes_and_ranks(
    run_file: str,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    environment: dict[str, str],
    code: int,
    output: str,
) -> None:
    recorder.raises = error
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert invoke("train", run_file) == (code, output)


def test_a_bug_keeps_its_traceback(run_file: str, recorder: Recorder) -> None:
    recorder.raises = ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        invoke("train", run_file)


def test_check_trains_nothing(run_file: str, recorder: Recorder) -> None:
    assert invoke("train", run_file, "--check") == (0, f"{run_file}: fine\n")
    assert invoke("train", run_file, "--check", "--quiet") == (0, "")
    assert recorder.config is None


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model that leaves a trace when it is called."""
    (tmp_path / "traced.py").write_text(
        "from pathlib import Path\n"
        "from torch import nn\n"
        "def model(width=64):\n"
        "    Path('called').touch()\n"
        "    return nn.Linear(64, width)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "traced", raising=False)
    return tmp_path / "called"


def test_check_calls_no_code_of_the_users_unless_told_to(run_file: str, own_code: Path) -> None:
    code, output = invoke("train", run_file, "model=traced:model", "--check")
    assert (code, output) == (0, f"{run_file}: fine; traced:model was found, and not called: --build does\n")
    assert invoke("submit", run_file, "model=traced:model", "--dry-run")[0] == 0
    code, output = invoke("train", run_file, "model={name: 'traced:model', args: {widht: 3}}", "--check")
    assert code == 2
    assert "model.args.widht: traced:model takes no such argument; did you mean 'width'?; it takes width\n" in output
    assert not own_code.exists()

    assert invoke("train", run_file, "model=traced:model", "--check", "--build") == (0, f"{run_file}: fine\n")
    assert own_code.exists()
    own_code.unlink()
    assert invoke("submit", run_file, "model=traced:model", "--dry-run", "--build")[0] == 0
    assert own_code.exists()
    assert invoke("train", run_file, "--build") == (
        2,
        "error: --build belongs to --check: a run builds its model anyway\n",
    )


@pytest.mark.parametrize(
    "command", [["train"], ["train", "--check", "--build"], ["doctor"], ["plan"], ["submit", "--dry-run"]]
)
@pytest.mark.usefixtures("own_code")
def test_what_makes_no_model_is_called_by_no_command(run_file: str, tmp_path: Path, command: list[str]) -> None:
    for kind in ("model", "data"):
        if kind == "data" and command == ["plan"]:
            continue  # it doesn't ask for data
        override = f"{kind}={{name: 'os:system', args: {{command: touch called}}}}"
        code, output = invoke(command[0], run_file, override, *command[1:])
        assert code == 2
        assert f"error: {kind}.name: found 'os:system', which no " in output
        assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("command", ["train", "doctor", "plan", "submit", "launch"])
def test_help_says_that_configurations_run_code(command: str) -> None:
    code, output = invoke(command, "--help")

    assert code == 0
    assert "It may name code, which is imported and run: use files that you trust." in " ".join(output.split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=autoencodr", "error: model.name: found 'autoencodr'; did you mean 'autoencoder'?"),
        ("model.args.dim=[1]", "error: model.args.dim: autoencoder takes no such argument; did you mean 'dims'?"),
        ("model.args.dims=[64]", "error: model.args: autoencoder refuses them: dims needs at least"),
        ("model.args.dims=3", "error: model.args: autoencoder refuses them: object of type 'int' has no len()"),
        ("model.args.dims=[64, -8]", "error: model.args: autoencoder refuses them: "),
        ("model=math:sqrt", "error: model.name: math:sqrt takes x by position only"),
        ("data=nowhere.at_all:digits", "error: data.name: found 'nowhere.at_all:digits', but there is no module"),
        ("data=math:pi", "error: data.name: found 'math:pi', which is float, not something to call"),
    ],
)
def test_check_looks_for_model_and_data(run_file: str, override: str, message: str) -> None:
    code, output = invoke("train", run_file, override, "--check")

    assert code == 2
    assert output.startswith(message)


def test_plan_shows_blocks_ranks_and_balance(run_file: str) -> None:
    code, output = invoke(
        "plan",
        run_file,
        "kfac.inversion.max_factor_dim=40",
        "kfac.curvature.exclude=[linear4]",
        "kfac.distribution.assignment=balanced",
        "kfac.distribution.placement=hybrid",
        "kfac.distribution.grad_worker_fraction=0.5",
        "--world-size=4",
    )
    rows = {line.split()[0]: line for line in output.splitlines() if line.strip()}

    assert code == 0
    assert "A 32+33 G 12" in rows["linear1"]
    assert f"{4 * (32**2 + 33**2 + 12**2):,}" in rows["linear1"]
    assert f"{32**3 + 33**3 + 12**3:.2e}" in rows["linear1"]
    assert {"0", "1", "2", "3"} <= rows.keys()
    assert "3 blocks, 7 units, 4 ranks. Inversion load, largest over mean: 1." in output
    assert "linear4.weight: matched by 'linear4' of kfac.curvature.exclude" in output


def test_plan_shows_splits_and_second_moments(run_file: str) -> None:
    splits = "kfac.inversion.splits={linear1: {inputs: [32, 33], outputs: 4}}"
    code, output = invoke("plan", run_file, splits, "kfac.inversion.solver=ekfac")
    rows = {line.split()[0]: line for line in output.splitlines() if line.strip()}

    assert code == 0, output
    assert "A 32+33 G 4·3" in rows["linear1"]
    assert f"{4 * 12 * 65:,} on " in rows["linear1"]

    code, output = invoke("plan", run_file, "kfac.inversion.splits={lineer1: 2}")
    assert code == 2
    assert "kfac.inversion.splits: 'lineer1' cuts nothing" in output
    assert "did you mean 'linear1'?" in output


def test_plan_shows_that_what_a_rank_keeps_shrinks(run_file: str) -> None:
    kept = []
    for size in (2, 4):
        code, output = invoke(
            *("plan", run_file, "engine.name=fsdp2", f"--world-size={size}"),
            *("kfac.distribution.reduction=reduce_scatter", "kfac.distribution.reduce_every=step"),
        )
        assert code == 0, output
        ranks = output[output.index("bytes kept") :].splitlines()[2 : 2 + size]
        kept.append(sum(int(line.split()[3].replace(",", "")) for line in ranks) / size)
    assert kept[1] < 0.6 * kept[0]  # 0.5, and a little more of every gradient crosses from rank to rank

    code, output = invoke("plan", run_file, "engine.name=fsdp2", "engine.fsdp2.replicas=2", "--world-size=3")
    assert code == 2
    assert output.startswith("error: engine.fsdp2.replicas: 2 copies don't divide 3 ranks evenly")


def test_a_plan_of_a_cluster_is_ten_lines_unless_all_is_asked_for(run_file: str) -> None:
    code, output = invoke("plan", run_file, "--world-size=1024", "kfac.curvature.exclude=[linear4]")
    lines = output.splitlines()

    assert code == 0
    assert len(lines) <= 12
    assert lines[0].startswith("3 blocks, 6 units, 1024 ranks. Inversion load, largest over mean: ")
    assert lines[1].startswith("Inverts most: rank ")
    assert lines[1].endswith("; 1018 ranks have nothing to invert")
    assert lines[2].startswith("Keeps most: rank ")
    assert f"  linear1: A 65 G 12, {4 * (65**2 + 12**2):,} bytes, {65**3 + 12**3:.2e} n³" in lines
    assert any(line.startswith("Spares most memory: ") for line in lines)
    assert "Plain gradient for 2 of the parameters: linear4.weight, linear4.bias" in lines
    assert lines[-1] == "Every block, every rank and every option: --all"

    code, whole = invoke("plan", run_file, "--world-size=1024", "--all")
    assert code == 0
    assert len(whole.splitlines()) > 1024
    assert {str(rank) for rank in range(1024)} <= {line.split()[0] for line in whole.splitlines() if line.strip()}
    assert invoke("plan", run_file, "--world-size=4")[1] == invoke("plan", run_file, "--world-size=4", "--all")[1]


def test_a_summary_names_blocks_that_differ_by_a_number_together() -> None:
    code, output = invoke("plan", "byte_gpt", "--world-size=64")
    lines = output.splitlines()

    assert code == 0
    assert len(lines) <= 12
    assert any(line.startswith("  blocks.0.contract … blocks.3.contract, 4 blocks: A 513 G 128, ") for line in lines)


@pytest.mark.parametrize("size", ["9" * 5000, "100001", "2,x"])
def test_no_plan_is_made_of_more_ranks_than_there_are(run_file: str, size: str) -> None:
    code, output = invoke("plan", run_file, f"--world-size={size}")

    assert code == 2
    assert output.startswith("error: --world-size: found '")
    assert output.endswith("expected numbers of ranks from 1 on, such as 8 or 8,64,512; at most 100,000\n")
    assert len(output) < 250


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_every_shipped_configuration_plans(file: Path) -> None:
    code, output = invoke("plan", str(file))

    assert code == 0, output
    assert "2 ranks. Inversion load" in output


def test_plan_builds_a_model_that_reads_its_values(
    run_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reads_values.py").write_text(
        "from torch import nn\n"
        "def model():\n"
        "    layer = nn.Linear(3, 2)\n"
        "    layer.weight.sum().item()\n"
        "    return layer\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    code, output = invoke("plan", run_file, "model=reads_values:model")

    assert code == 0
    assert "1 blocks, 2 units, 2 ranks" in output


def test_plan_refuses_what_does_not_fit_the_ranks(run_file: str) -> None:
    hybrid = ["kfac.distribution.placement=hybrid", "kfac.distribution.grad_worker_fraction=0.3"]

    code, output = invoke("plan", run_file, *hybrid)

    assert code == 2
    assert output.startswith("error: kfac.distribution.grad_worker_fraction: 0.3 of 2 ranks")


def test_doctor_has_a_verdict_and_a_code(run_file: str) -> None:
    code, output = invoke("doctor", run_file, "--world-size=2")
    assert code == 0, output
    assert output.rstrip().endswith("mine: ready")
    assert "linear1.weight" in output
    assert "planned for 2" in output

    code, output = invoke("doctor", run_file, "loss.name=cross_entropy", "--json")
    report = json.loads(output)
    assert code == 1
    assert report["verdict"] == "not ready: 1 thing to put right"
    assert [row["name"] for row in report["parameters"]][:2] == ["linear1.weight", "linear1.bias"]

    code, output = invoke("doctor", run_file, "model.name=autoencodr")
    assert code == 2
    assert output.startswith("error: model.name: found 'autoencodr'")


def test_version_names_what_a_bug_report_needs() -> None:
    code, output = invoke("version")

    assert code == 0
    assert [line.split()[0] for line in output.splitlines()] == [
        "kfac_dist",
        "torch",
        "numpy",
        "deepspeed",
        "mpi4py",
        "python",
    ]


def test_a_call_without_a_configuration_says_how_to_call() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "kfac_dist", "train"], capture_output=True, text=True, timeout=60, check=False
    )

    assert ended.returncode == 2
    assert "Usage: kfac-dist train" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_rank_that_has_lost_the_others_ends_though_it_waits_for_them() -> None:
    program = (
        "import time\n"
        "from kfac_dist.cli import exits\n"
        "from kfac_dist.errors import CollectiveError\n"
        "exits.LAST_SECONDS = 0.1\n"
        "exits.insist(CollectiveError('no answer from rank 1'))\n"
        "time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stderr) == (2, "error: no answer from rank 1\n")
