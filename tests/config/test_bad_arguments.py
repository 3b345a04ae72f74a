"""Overrides that can't be, alone or with the rest of a run: each is refused with a message that says what to write."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kfac_dist.cli import app
from tests.config.bad import refused

# Arguments after the file → what the message says.
ARGUMENTS = {
    "no equals sign": (["steps"], "command line: found 'steps', expected key=value"),
    "no key": (["=3"], "command line: found '=3', expected key=value"),
    "empty part": (["train..steps=3"], "command line: found 'train..steps=3', expected key=value"),
    "include": (["include=other.yaml"], "an include belongs in a file"),
    "bad value": (["train.steps=[1"], "command line (train.steps=[1): not valid YAML"),
    "below a number": (["train.steps.x=1"], "command line (train.steps.x=1): train.steps: found a mapping, expected"),
    "entry that a list hasn't": (
        ["model.args.dims.2=3"],
        "command line (model.args.dims.2=3): model.args.dims is a list, which has entries 0 to 1, not 2",
    ),
    "name in a list": (["model.args.dims.first=3"], "model.args.dims is a list, which has entries 0 to 1, not first"),
    "entry before a list": (["model.args.dims.-1=3"], "model.args.dims is a list, which has entries 0 to 1, not -1"),
    "entry of an empty list": (["model.args.dims=[]", "model.args.dims.0=3"], "which has no entries, not 0"),
    "entry of a default": (
        ["optimizer.betas.0=0.8"],
        "there is no list at optimizer.betas whose entry 0 could be set: give the whole list, optimizer.betas=[…]",
    ),
    "entry of nothing": (["model.args.sizes.0=3"], "there is no list at model.args.sizes whose entry 0 could be set"),
    "entry of a value that is wrong": (
        ["optimizer.betas=[0.8, 0.9]", "optimizer.betas.1=x"],
        "command line (optimizer.betas.1=x): optimizer.betas.1: found 'x', expected a number >= 0 and < 1",
    ),
    "misspelt": (["train.step=1"], "command line (train.step=1): train.step: unknown key; did you mean 'steps'?"),
    "two mistakes": (["train.step=1", "run.sed=1"], "run.sed: unknown key; did you mean 'seed'?"),
    "schedule without its end": (["optimizer.lr.kind=cosine"], "optimizer.lr.kind cosine needs final"),
    "end of a constant": (["optimizer.lr.final=0.1"], "optimizer.lr.final has no effect on a constant schedule"),
    "length of a constant": (["optimizer.lr.steps=3"], "optimizer.lr.steps has no effect on a constant schedule"),
    "exponential to zero": (
        ["kfac.inversion.damping={value: 1, kind: exponential, final: 0}"],
        "kfac.inversion.damping.final is 0, which an exponential schedule never reaches",
    ),
    "warm-up longer than the schedule": (
        ["optimizer.lr={value: 1, kind: linear, final: 0, steps: 5, warmup_steps: 5}"],
        "optimizer.lr.steps (5) must exceed warmup_steps (5)",
    ),
    "warm-up without steps": (["optimizer.lr.warmup_from=0.1"], "optimizer.lr.warmup_from has no effect without"),
    "a split that cuts nothing": (["kfac.inversion.splits={'layers.*': 1}"], "1 part cuts nothing: give inputs or"),
    "a split of one side that cuts nothing": (
        ["kfac.inversion.splits={'layers.*': {outputs: [64]}}"],
        "1 part cuts nothing: give inputs or outputs 2 or more, or leave these layers out of splits",
    ),
    "length of comparisons that never happen": (
        ["optimizer=null", "kfac.solver=cg", "kfac.cg.compare_iterations=100"],
        "kfac.cg.compare_iterations is gone: leave it out; comparisons end after 500 iterations",
    ),
    "damping of a player without K-FAC": (
        ["game={discriminator: {damping_factor: 2.0}}", "loss.name=adversarial", "kfac.enabled=false"],
        "game.discriminator.damping_factor (2.0) has no effect without K-FAC: leave it out, or set kfac.enabled to",
    ),
    "stagger too wide": (["kfac.inversion.stagger=11"], "kfac.inversion.stagger (11) may be at most"),
    "slots and parts": (
        ["kfac.curvature.stagger=5", "kfac.inversion.stagger=12"],
        "kfac.inversion.stagger (12) must be a multiple of curvature.stagger (5)",
    ),
    "slots beyond every turn": (
        ["kfac.curvature.stagger=2", "kfac.inversion.stagger=22"],
        "kfac.inversion.stagger (22) may be at most",
    ),
    "more turns than steps": (
        ["kfac.curvature.stagger=11", "kfac.inversion.stagger=11"],
        "kfac.curvature.stagger (11) may be at most factor_every (10)",
    ),
    "turns of own passes": (
        ["kfac.curvature.stagger=2", "kfac.inversion.stagger=2", "kfac.curvature.fisher=mc"],
        "kfac.curvature.stagger (2) must be 1 while fisher is mc",
    ),
    "turns of second moments": (
        ["kfac.curvature.stagger=2", "kfac.inversion.stagger=2", "kfac.inversion.solver=ekfac"],
        "kfac.curvature.stagger (2) must be 1 while inversion.solver is ekfac",
    ),
    "lag too long": (["kfac.inversion.inverse_lag=100"], "kfac.inversion.inverse_lag (100) must be shorter"),
    "hybrid without fraction": (["kfac.distribution.placement=hybrid"], "placement hybrid needs grad_worker_fraction"),
    "fraction without hybrid": (["kfac.distribution.grad_worker_fraction=0.5"], "grad_worker_fraction needs placement"),
    "fraction above one": (["kfac.distribution.grad_worker_fraction=1.5"], "expected a number > 0 and <= 1 or null"),
    "cost model": (
        ["kfac.distribution.cost_model=measured"],
        "kfac.distribution.cost_model is gone: leave it out; assignment: balanced goes by n³",
    ),
    "unknown fisher": (["kfac.curvature.fisher=emprical"], "did you mean 'empirical'?"),
    "unknown sharing in a pattern": (
        ["kfac.curvature.sharing_overrides={'blocks.*': reduced}"],
        "kfac.curvature.sharing_overrides.blocks.*: found 'reduced', expected one of expand, reduce",
    ),
    "pattern instead of patterns": (["kfac.curvature.include=conv*"], "found 'conv*', expected a list of"),
    "likelihood against loss": (
        ["kfac.curvature.likelihood=gaussian"],
        "contradicts loss.name (sigmoid_cross_entropy)",
    ),
    "terms against loss": (["kfac.curvature.loss_terms=token"], "kfac.curvature.loss_terms (token) contradicts"),
    "classes of pixels": (
        ["kfac.curvature.class_conditional=true"],
        "kfac.curvature.class_conditional needs targets that are classes, loss.name (sigmoid_cross_entropy) has none",
    ),
    "no class at all": (
        ["loss.name=cross_entropy", "kfac.curvature.class_conditional={classes: 0}"],
        "kfac.curvature.class_conditional.classes: found 0, expected a whole number >= 1",
    ),
    "classes without G": (
        ["loss.name=cross_entropy", "kfac.curvature={class_conditional: true, fisher: input_only}"],
        "class_conditional has no effect on fisher input_only",
    ),
    "classes of a sample's tokens": (
        ["loss.name=token_cross_entropy", "kfac.curvature={class_conditional: true, sharing: reduce}"],
        "kfac.curvature.class_conditional needs kfac.curvature.sharing: expand for a loss of tokens",
    ),
    "ignored class of bits": (["loss.ignore_index=0"], "loss.ignore_index has no effect on sigmoid_cross_entropy"),
    "lr of a clip that is off": (
        ["kfac.update={kl_clip: null, kl_clip_lr: 0.1}"],
        "kfac.update.kl_clip_lr has no effect while kl_clip is null",
    ),
    "neither word nor number": (["kfac.update.kl_clip_lr=x"], "found 'x', expected current or a number > 0"),
    "nesterov without momentum": (["optimizer={momentum: 0.0, nesterov: true}"], "nesterov needs momentum > 0"),
    "nesterov adamw": (["optimizer={name: adamw, nesterov: true}"], "optimizer.nesterov has no effect on adamw"),
    "betas of sgd": (["optimizer.betas=[0.8, 0.99]"], "optimizer.betas has no effect on sgd: leave it out"),
    "momentum of a sign": (
        ["optimizer.name=ssd", "optimizer.momentum=0.5"],
        "optimizer.momentum has no effect on ssd: leave it out",
    ),
    "beta of sgd": (["optimizer.beta=0.8"], "optimizer.beta has no effect on sgd: leave it out"),
    "two betas of one": (
        ["optimizer={name: msvag, lr: 0.1, betas: [0.8, 0.99]}"],
        "optimizer.betas has no effect on msvag: leave it out",
    ),
    "variance of momentum": (["metrics.relative_variance=true"], "metrics.relative_variance needs an optimizer that"),
    "variance of two betas": (
        ["metrics.relative_variance=true", "optimizer={name: adamw, lr: 0.1}"],
        "found adamw: set optimizer.name to svag or msvag, or give adamw two equal betas",
    ),
    "scope of a graft": (
        ["kfac.update.graft_scope=global"],
        "kfac.update.graft_scope is gone: leave it out; each layer gets its own length",
    ),
    "graft of nothing": (["kfac.update.graft=adam"], "kfac.update.graft: found 'adam', expected"),
    "graft beside a diagonal": (
        ["kfac.update.graft=sign", "kfac.curvature.uncovered=diagonal"],
        "curvature.uncovered: diagonal would have no effect",
    ),
    "graft beside drawn labels": (
        ["kfac.update.graft=sign", "kfac.curvature={uncovered: diagonal_mc, fisher: mc}"],
        "curvature.uncovered: diagonal_mc would have no effect",
    ),
    "graft of a chain": (
        ["kfac.update.graft=sign", "kfac.inversion={structure: block_tridiagonal, solver: eigen, inverse_every: 100}"],
        "update.graft measures layers one by one",
    ),
    "graft of a solver": (
        ["kfac.update.graft=sign", "kfac.solver=cg", "optimizer=null"],
        "update.graft has no effect while solver is cg",
    ),
    "adaptation to nothing": (
        ["kfac.inversion.adapt={every: 5}", "kfac.update.kl_clip=null"],
        "inversion.adapt follows the trust region, and there is none",
    ),
    "adaptation that stands still": (["kfac.inversion.adapt.rate=1"], "adapt.rate: found 1, expected a number > 1"),
    "beta zero": (["optimizer={name: svag, lr: 0.1, beta: 0}"], "optimizer.beta: found 0, expected a number > 0"),
    "one beta": (["optimizer.betas=[0.8]"], "optimizer.betas.1: missing; expected a number >= 0 and < 1"),
    "three betas": (
        ["optimizer.betas=[0.8, 0.9, 0.99]"],
        "optimizer.betas: found [0.8, 0.9, 0.99], expected a list of 2",
    ),
    "no optimizer": (["optimizer=null"], "optimizer: missing; expected a mapping with keys name, lr"),
    "options of another solver": (["kfac.cg.lr=1"], "kfac.cg has no effect while solver is direct"),
    "chain without eigen": (
        ["kfac.inversion.structure=block_tridiagonal"],
        "inversion.solver (cholesky) must be eigen while inversion.structure is block_tridiagonal",
    ),
    "chain under a sharded engine": (
        ["kfac.inversion={structure: block_tridiagonal, solver: eigen}", "engine.name=fsdp2"],
        "kfac.inversion.structure (block_tridiagonal) needs engine.name ddp, found fsdp2",
    ),
    "chain on owners": (
        ["kfac.inversion={structure: block_tridiagonal, solver: eigen}", "kfac.distribution.placement=owner"],
        "kfac.distribution.placement (owner) must be auto or replicated while",
    ),
    "chain without G": (
        ["kfac.inversion={structure: block_tridiagonal, solver: eigen}", "kfac.curvature.fisher=input_only"],
        "kfac.curvature.fisher input_only has no G while inversion.structure is block_tridiagonal",
    ),
    "options of newton": (["kfac.newton.gamma_every=4"], "kfac.newton has no effect while solver is direct"),
    "search between inverses": (
        ["optimizer=null", "kfac={solver: newton, newton: {gamma_every: 30}}"],
        "kfac.newton.gamma_every (30) must be a multiple of inversion.inverse_every (100)",
    ),
    "search with staggered inverses": (
        ["optimizer=null", "kfac={solver: newton, inversion: {inverse_every: 20, stagger: 2}}"],
        "needs all inverses at once and in time: set inversion.stagger to 1",
    ),
    "scheduled damping of newton": (
        ["optimizer=null", "kfac={solver: newton, inversion: {damping: {value: 1, kind: linear, final: 0}}}"],
        "kfac.inversion.damping must be a plain number while solver is newton",
    ),
    "newton's bounds the wrong way round": (
        ["optimizer=null", "kfac={solver: newton, newton: {damping_bounds: [2.0, 1.0]}}"],
        "kfac.newton.damping_bounds ([2.0, 1.0]) must be the least λ, then the greatest",
    ),
    "share of products that is no 1/k": (
        ["optimizer=null", "kfac={solver: newton, newton: {products_fraction: 0.7}}"],
        "kfac.newton.products_fraction (0.7) must be 1/k",
    ),
    "share of products of tokens": (
        [
            "optimizer=null",
            "loss.name=token_cross_entropy",
            "kfac={solver: newton, newton: {products_fraction: 0.5}, inversion: {inverse_every: 20}}",
        ],
        "kfac.newton.products_fraction (0.5) needs a loss with one term a sample",
    ),
    "solver without K-FAC": (["optimizer=null", "kfac={solver: cg, enabled: false}"], "solver cg builds on K-FAC"),
    "solver beside an optimizer": (["kfac.solver=cg"], "optimizer has no effect while kfac.solver is cg"),
    "solver beside a clip": (
        ["optimizer=null", "kfac.solver=cg", "kfac.update.kl_clip=0.1"],
        "kfac.update.kl_clip (0.1) has no effect while solver is cg",
    ),
    "solver under another engine": (
        ["optimizer=null", "kfac.solver=cg", "engine.name=fsdp2"],
        "engine.name (fsdp2) must be ddp while kfac.solver is cg",
    ),
    "solver and batches of all ranks": (
        ["optimizer=null", "kfac.solver=cg", "engine.sync_batchnorm=true"],
        "engine.sync_batchnorm can't be true while kfac.solver is cg",
    ),
    "solver and a clipped gradient": (
        ["optimizer=null", "kfac.solver=cg", "train.clip_grad_norm=1"],
        "train.clip_grad_norm has no effect while kfac.solver is cg",
    ),
    "warm start that grows": (
        ["optimizer=null", "kfac={solver: cg, cg: {warm_start: 1.5}}"],
        "kfac.cg.warm_start: found 1.5, expected",
    ),
    "damping with two masters": (
        ["optimizer=null", "kfac.solver=cg", "kfac.cg={adapt_every: 5, damping: {value: 1, kind: linear, final: 0}}"],
        "kfac.cg.adapt_every (5) and a linear damping both move",
    ),
    "damping that starts outside of its bounds": (
        ["optimizer=null", "kfac={solver: newton, newton: {damping_bounds: [0.01, 1.0]}, inversion: {damping: 0.003}}"],
        "inversion.damping (0.003) is where λ starts while solver is newton, and lies outside of newton.damping_bounds",
    ),
    "damping that warms up from nothing": (
        ["kfac.inversion.damping={value: 0.03, warmup_steps: 100}"],
        "kfac.inversion.damping.warmup_steps (100) needs warmup_from, such as 3, to come down from: from 0 the first",
    ),
    "damping of CG that warms up from nothing": (
        ["optimizer=null", "kfac.solver=cg", "kfac.cg.damping={value: 0.1, warmup_steps: 9, warmup_from: 0.0}"],
        "kfac.cg.damping.warmup_steps (9) needs warmup_from, such as 10, to come down from",
    ),
    "damping that warms up and adapts": (
        [
            "optimizer=null",
            "kfac.solver=cg",
            "kfac.cg={adapt_every: 5, damping: {value: 1, warmup_steps: 3, warmup_from: 2}}",
        ],
        "kfac.cg.adapt_every (5) and damping's warm-up both move",
    ),
    "preconditioner's schedule for a damping that adapts": (
        [
            "optimizer=null",
            "kfac.solver=cg",
            "kfac.cg.adapt_every=5",
            "kfac.inversion.damping={value: 1, kind: linear, final: 0.1}",
        ],
        "cg.adapt_every (5) moves λ, and so does the schedule of inversion.damping",
    ),
    "rival without lr": (["compare.adamw.name=adamw"], "compare.adamw.lr: missing; expected a number > 0"),
    "engine of a later version": (["engine.name=pipeline"], "engine.name: found 'pipeline', expected"),
    "bad run name": (["--name", "a b"], "command line (--name): run.name: found 'a b', expected text that matches"),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_a_bad_argument_is_named(good: Path, arguments: list[str], message: str) -> None:
    assert message in refused([str(good), *arguments])


NINES = "9" * 32
NAMES = "expected text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$, at most 100 characters"
TOO_MANY = f"found {NINES}, expected a whole number >= 1"
# Values that no run has → what the message says.
BEYOND = {
    f"run.name={'n' * 300}": f"run.name: found '{'n' * 57}...', {NAMES}",
    f"run.directory={'d' * 300}": f"run.directory: found '{'d' * 57}', expected a path: printable, no name in",
    f"run.directory={'d/' * 3000}": "expected text, at most 1000 characters",
    'run.directory="a\\0b"': r"run.directory: found 'a\x00b', expected a path",
    'checkpoint.resume="a\\nb"': r"checkpoint.resume: found 'a\nb', expected a path",
    f"model.name={'m' * 300}": "model.name: found 'mmm",
    f"compare={{{'c' * 300}: {{lr: 1}}}}": f"compare: found the name '{'c' * 60}', which names the folder of its files",
    "compare={../../x: {lr: 1}}": "compare: found the name '../../x', which names the folder of its files: expected",
    f"train.steps={NINES}": f"train.steps: {TOO_MANY} or null, at most 1,000,000,000",
    f"train.batch_size={NINES}": f"train.batch_size: {TOO_MANY}, at most 1,000,000,000",
    f"train.accumulate={NINES}": f"train.accumulate: {TOO_MANY}, at most 1,000,000,000",
    f"checkpoint.keep={NINES}": f"checkpoint.keep: {TOO_MANY}, at most 1,000,000,000",
    f"checkpoint.every=-{NINES}": f"checkpoint.every: found -{NINES}, expected a whole number >= 0",
    f"optimizer.lr={{value: 1, kind: linear, final: 0, steps: {NINES}}}": "optimizer.lr.steps: found 999",
    f"loss.ignore_index=-{NINES}": f"found -{NINES}, expected a whole number, at least -1,000,000,000",
    f"run.seed={NINES}": "run.seed: found 999",
    f"run.timeout_seconds={NINES}": "run.timeout_seconds: found 999",
    f"kfac.inversion.splits={{x: {{inputs: {NINES}}}}}": "or null, at most 1,000,000,000",
    "train.loader_workers=100000": "train.loader_workers: found 100000, expected a whole number >= 0 and <= 1024",
    "game={grid: 100000}": "game.grid: found 100000, expected a whole number >= 1 and <= 100",
    "optimizer.lr=1e300": "optimizer.lr.value: found 1e+300, expected a number > 0, at most 1e+30",
    "optimizer.lr=1e-300": "optimizer.lr.value: found 1e-300, expected a number > 0, at least 1e-30",
    "kfac.inversion.damping=1e-40": "kfac.inversion.damping.value: found 1e-40, expected a number > 0, at least 1e-30",
    "optimizer.weight_decay=1e40": "optimizer.weight_decay: found 1e+40, expected a number >= 0, at most 1e+30",
    "train.divergence.damping_factor=1e40": "expected a number >= 1, at most 1e+30",
    "kfac.update.kl_clip_lr=1e99": "found 1e+99, expected current or a number > 0, at most 1e+30",
}


@pytest.mark.parametrize(("argument", "message"), BEYOND.items(), ids=[text[:40] for text in BEYOND])
def test_what_no_run_has_is_refused(good: Path, argument: str, message: str) -> None:
    lines = refused([str(good), argument, "--check"]).splitlines()

    assert message in lines[0]
    assert len(lines) == 1
    assert len(lines[0]) < 600


def test_bounds_are_beyond_what_runs_have(good: Path) -> None:
    fine = ["train.steps=1000000000", f"run.name={'n' * 100}", "optimizer.lr=1e-12", "kfac.inversion.damping=1e+9"]

    assert CliRunner().invoke(app, ["train", str(good), *fine, "--check"]).exit_code == 0
