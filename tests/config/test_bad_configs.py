"""Malformed configurations: each ends the command line with code 2 and a message, and without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kfac_dist.cli import app

GOOD = """\
run:
  name: good
model:
  name: autoencoder
  args: {dims: [64, 8]}
data: digits
loss:
  name: sigmoid_cross_entropy
optimizer:
  lr: 0.1
  momentum: 0.9
train:
  batch_size: 64
  steps: 4
kfac:
  curvature:
    factor_every: 10
  inversion:
    inverse_every: 100
"""

# What the file says instead of a line of GOOD → what the message says. {file} is the file's path.
LINES = {
    "text for a count": ("batch_size: 64", "batch_size: many", "{file}:13: train.batch_size: found 'many'"),
    "quoted count": ("batch_size: 64", "batch_size: '64'", "expected a whole number >= 1: leave out the quotes"),
    "fraction for a count": ("batch_size: 64", "batch_size: 6.5", "found 6.5, expected a whole number >= 1"),
    "float for a count": ("batch_size: 64", "batch_size: 64.0", "found 64.0, expected a whole number >= 1"),
    "boolean for a count": ("batch_size: 64", "batch_size: true", "found true, expected a whole number >= 1"),
    "batch that doesn't grow": (
        "batch_size: 64",
        "batch_size: 64\n  batch_growth: {final: 64, steps: 9}",
        "train.batch_growth.final (64) must exceed batch_size (64)",
    ),
    "growing batch under DeepSpeed": (
        "train:\n  batch_size: 64",
        "engine: {name: zero1}\ntrain:\n  batch_size: 64\n  batch_growth: {final: 128, steps: 9}",
        "train.batch_growth and engine.name zero1 exclude each other",
    ),
    "drawn labels for the diagonal of an empirical Fisher": (
        "factor_every: 10",
        "factor_every: 10\n    uncovered: diagonal_mc",
        "uncovered diagonal_mc draws labels from the model, which fisher empirical doesn't: set fisher to mc or type2",
    ),
    "drawn labels for the diagonal of shards": (
        "kfac:\n  curvature:",
        "engine: {name: fsdp2}\nkfac:\n  curvature:\n    fisher: mc\n    uncovered: diagonal_mc",
        "kfac.curvature.uncovered diagonal_mc needs engine.name: ddp, found fsdp2",
    ),
    "groups apart by class": (
        "factor_every: 10\n  inversion:",
        "factor_every: 10\n    class_conditional: true\n  inversion:\n    splits: {conv: per_group}",
        "kfac.inversion.splits (conv: per_group) and curvature.class_conditional exclude each other",
    ),
    "sizes without a side": (
        "inverse_every: 100",
        "inverse_every: 100\n    splits: {encoder: [3, 4]}",
        "kfac.inversion.splits.encoder: sizes [3, 4] need a side: write {{outputs: [3, 4]}}, or inputs",
    ),
    "a way to split that there isn't": (
        "inverse_every: 100",
        "inverse_every: 100\n    splits: {encoder: per_haed}",
        "found 'per_haed', expected one of per_head, per_group or null; did you mean 'per_head'?",
    ),
    "heads and sizes": (
        "inverse_every: 100",
        "inverse_every: 100\n    splits: {encoder: {by: per_head, inputs: 2}}",
        "give per_head, per_group, a number, or a mapping with inputs or outputs: one of them",
    ),
    "number of heads without heads": (
        "inverse_every: 100",
        "inverse_every: 100\n    splits: {encoder: {outputs: 2, heads: 2}}",
        "kfac.inversion.splits.encoder.heads has no effect without by: per_head",
    ),
    "no parts": ("inverse_every: 100", "inverse_every: 100\n    splits: {encoder: 0}", "expected a whole number >= 1"),
    "moments without EKFAC": (
        "inverse_every: 100",
        "inverse_every: 100\n    rescale_every: 5",
        "kfac.inversion.rescale_every has no effect on solver cholesky",
    ),
    "moments between measurements": (
        "inverse_every: 100",
        "inverse_every: 100\n    solver: ekfac\n    rescale_every: 4",
        "kfac.inversion.rescale_every (4) must divide curvature.factor_every (10)",
    ),
    "EKFAC with bases on the host": (
        "inverse_every: 100",
        "inverse_every: 100\n    solver: ekfac\n    offload: true",
        "kfac.inversion.offload and inversion.solver ekfac exclude each other",
    ),
    "EKFAC without output gradients": (
        "factor_every: 10\n  inversion:",
        "factor_every: 10\n    fisher: input_only\n  inversion:\n    solver: ekfac",
        "kfac.inversion.solver ekfac needs the gradients of single samples",
    ),
    "zero count": ("batch_size: 64", "batch_size: 0", "found 0, expected a whole number >= 1"),
    "null count": ("batch_size: 64", "batch_size:", "found null, expected a whole number >= 1"),
    "missing key": ("  batch_size: 64\n", "", "{file}:12: train.batch_size: missing; expected a whole number >= 1"),
    "missing section": ("loss:\n  name: sigmoid_cross_entropy\n", "", "loss: missing; expected a mapping with keys"),
    "negative lr": ("lr: 0.1", "lr: -0.1", "optimizer.lr.value: found -0.1, expected a number > 0"),
    "boolean lr": ("lr: 0.1", "lr: true", "optimizer.lr: found true, expected a number > 0 or a mapping"),
    "infinite lr": ("lr: 0.1", "lr: .inf", "optimizer.lr.value: found inf, expected a number > 0"),
    "momentum not a number": ("momentum: 0.9", "momentum: .nan", "found nan, expected a number >= 0 and < 1"),
    "momentum out of range": ("momentum: 0.9", "momentum: 1.0", "found 1.0, expected a number >= 0 and < 1"),
    "octal-looking number": ("momentum: 0.9", "momentum: 09", "found '09', expected a number"),
    "list for a number": ("momentum: 0.9", "momentum: [0.9]", "optimizer.momentum: found [0.9], expected a number"),
    "list for a section": ("  batch_size: 64\n  steps: 4", "  - 1", "train: found [1], expected a mapping with keys"),
    "text for a section": ("  name: sigmoid_cross_entropy", "  mse", "loss: found 'mse', expected a mapping"),
    "mapping for text": ("name: good", "name: {a: 1}", "run.name: found a mapping, expected text that matches"),
    "number for text": ("name: good", "name: 3", "{file}:2: run.name: found 3, expected text that matches"),
    "path as run name": ("name: good", "name: ../other", "run.name: found '../other', expected text that matches"),
    "yes for a flag": ("  momentum: 0.9", "  nesterov: yes", "nesterov: found 'yes', expected true or false"),
    "number for a flag": ("  momentum: 0.9", "  nesterov: 1", "nesterov: found 1, expected true or false"),
    "misspelt key": ("momentum: 0.9", "momentun: 0.9", "optimizer.momentun: unknown key; did you mean 'momentum'?"),
    "misspelt section": ("train:", "trian:", "{file}:12: trian: unknown key; did you mean 'train'?"),
    "key of another section": ("momentum: 0.9", "batch_size: 9", "unknown key; did you mean train.batch_size?"),
    "key of nowhere": ("momentum: 0.9", "zzz: 9", "optimizer.zzz: unknown key; the keys here are name, lr, momentum"),
    "unknown loss": ("sigmoid_cross_entropy", "sigmoid_crossentropy", "did you mean 'sigmoid_cross_entropy'?"),
    "unknown optimizer": ("momentum: 0.9", "name: adam", "expected one of sgd, adamw, ssd, mssd, svag, msvag; did"),
    "empty target": ("data: digits", "data: ''", "data.name: found '', expected non-empty text"),
    "number for a target": ("data: digits", "data: 3", "data: found 3, expected a name or a mapping"),
    "list for arguments": ("args: {dims: [64, 8]}", "args: [64, 8]", "model.args: found [64, 8], expected a mapping"),
    "misaligned intervals": (
        "inverse_every: 100",
        "inverse_every: 105",
        "{file}:19: kfac.inversion.inverse_every (105)",
    ),
    "steps and epochs": ("steps: 4", "steps: 4\n  epochs: 2", "{file}:14: train.steps: give steps or epochs"),
    "neither steps nor epochs": ("  steps: 4\n", "", "train: give steps or epochs, one of the two"),
    "batch smaller than micro-batches": ("steps: 4", "steps: 4\n  accumulate: 65", "train.batch_size (64) must be at"),
    "adversarial loss without a game": (
        "sigmoid_cross_entropy",
        "adversarial",
        "{file}:8: loss.name adversarial is the",
    ),
    "game with another loss": ("kfac:", "game: {}\nkfac:", "{file}:8: loss.name (sigmoid_cross_entropy) is no game's"),
    "game under another engine": (
        "sigmoid_cross_entropy",
        "adversarial\ngame: {}\nengine: {name: fsdp2}",
        "{file}:10: engine has no effect on a game",
    ),
    "game with accumulation": (
        "sigmoid_cross_entropy\noptimizer:\n  lr: 0.1\n  momentum: 0.9\ntrain:\n",
        "adversarial\noptimizer:\n  lr: 0.1\ngame: {}\ntrain:\n  accumulate: 2\n",
        "{file}:13: train.accumulate (2) must be 1 in a game",
    ),
    "alignment without adjustment": (
        "kfac:",
        "game: {adjustment: 0.0, align: true}\nkfac:",
        "game.align has no effect while adjustment is 0",
    ),
    "duplicate key": ("steps: 4", "steps: 4\n  steps: 5", "{file}:15: train.steps: given twice, first in line 14"),
    "duplicate section": ("kfac:", "run: {name: b}\nkfac:", "{file}:15: run: given twice, first in line 1"),
    "key that isn't text": ("steps: 4", "4: 4", "{file}:14: keys are text, found 4: quote it"),
    "key that is a list": ("steps: 4", "? [a]\n  : 4", "{file}:14: keys are text, found a collection"),
    "tab": ("  steps: 4", "\tsteps: 4", "{file}:14: not valid YAML: found a tab: indent with spaces"),
    "open bracket": ("dims: [64, 8]", "dims: [64, 8", "{file}:5: not valid YAML: expected ',' or ']'"),
    "bad indentation": ("  steps: 4", "   steps: 4", "{file}:14: not valid YAML"),
    "python object": (
        "name: good",
        "name: !!python/name:os.system x",
        "{file}:2: the YAML tag !!python/name:os.system",
    ),
    "tagged collection": ("data: digits", "data: !!set {digits}", "the YAML tag !!set is not supported"),
    "tag that lies": ("steps: 4", "steps: !!int four", "'four' is not what its tag"),
    "unknown alias": ("steps: 4", "steps: *steps", "{file}:14: not valid YAML: found undefined alias"),
    "alias of itself": ("args: {dims: [64, 8]}", "args: &a {dims: *a}", "refers to the value that it is part of"),
    "merge of a scalar": ("steps: 4", "<<: 4", "{file}:14: << merges mappings, found 4"),
    "two documents": ("train:", "---\ntrain:", "{file}:12: not valid YAML"),
    "control character": ("name: good", "name: go\x01od", "not valid YAML: special characters are not allowed"),
    "missing include": ("run:", "include: base.yaml\nrun:", "{file}:1: "),
    "number for an include": ("run:", "include: 3\nrun:", "{file}:1: include: found 3, expected a file name"),
    "include of itself": ("run:", "include: run.yaml\nrun:", "{file}:1: include: files include each other: "),
}

# Arguments after the file → what the message says.
ARGUMENTS = {
    "no equals sign": (["steps"], "command line: found 'steps', expected key=value"),
    "no key": (["=3"], "command line: found '=3', expected key=value"),
    "empty part": (["train..steps=3"], "command line: found 'train..steps=3', expected key=value"),
    "include": (["include=other.yaml"], "an include belongs in a file"),
    "bad value": (["train.steps=[1"], "command line (train.steps=[1): not valid YAML"),
    "below a number": (["train.steps.x=1"], "command line (train.steps.x=1): train.steps: found a mapping, expected"),
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
        "kfac.cg.compare_iterations (100) has no effect while compare_every is 0, which never compares: leave it out",
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
    "measured round robin": (["kfac.distribution.cost_model=measured"], "cost_model measured has no effect"),
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
    "scope of no graft": (["kfac.update.graft_scope=global"], "graft_scope has no effect while graft is null"),
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
    "damping that warms up and adapts": (
        ["optimizer=null", "kfac.solver=cg", "kfac.cg={adapt_every: 5, damping: {value: 1, warmup_steps: 3}}"],
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


def refused(arguments: list[str]) -> str:
    """Run `kfac-dist train` in this process; return what it printed after checking how it ended."""
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert "Traceback" not in result.output
    assert all(line.startswith("error: ") for line in result.output.splitlines()), result.output
    return result.output


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(GOOD)
    return file


@pytest.mark.parametrize(("old", "new", "message"), LINES.values(), ids=LINES.keys())
def test_a_bad_line_is_named(good: Path, old: str, new: str, message: str) -> None:
    assert GOOD.count(old) == 1
    good.write_text(GOOD.replace(old, new))

    assert message.format(file=good) in refused([str(good)])


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_a_bad_argument_is_named(good: Path, arguments: list[str], message: str) -> None:
    assert message in refused([str(good), *arguments])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; a run needs the sections"),
        (b"# nothing but a comment\n", "the file is empty; a run needs the sections"),
        (b"- a\n- b\n", "the top level is ['a', 'b'], expected a mapping of sections"),
        (b"just text", "the top level is 'just text', expected a mapping of sections"),
        (b"run: {name: \xff}", "not UTF-8 text (byte 12): save the file as UTF-8"),
        (b"\x80\x04\x95", "not UTF-8 text (byte 0)"),
    ],
    ids=["empty", "comment", "list", "text", "latin-1", "binary"],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)

    assert message in refused([str(file)])


def test_a_missing_file_suggests_its_neighbour(good: Path) -> None:
    assert f"no such file; did you mean {good}?" in refused([str(good.with_name("rum.yaml"))])
    assert "nowhere.yaml: no such file" in refused(["nowhere.yaml"])


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "can't be read: Is a directory" in refused([str(tmp_path)])


def test_an_include_cycle_is_shown(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"include: {other}.yaml\n")

    output = refused([str(tmp_path / "a.yaml")])

    assert " → ".join(str(tmp_path / f"{name}.yaml") for name in "abca") in output


def test_a_mistake_in_an_included_file_names_that_file(good: Path) -> None:
    base = good.with_name("base.yaml")
    base.write_text("\noptimizer:\n  momentum: 2\n")
    good.write_text("include: base.yaml\n" + GOOD.replace("  momentum: 0.9\n", ""))

    assert f"{base}:3: optimizer.momentum: found 2, expected" in refused([str(good)])


def test_all_mistakes_are_reported_in_the_order_of_the_file_up_to_a_limit(good: Path) -> None:
    keys = "".join(f"  wrong{index}: 1\n" for index in range(14))
    good.write_text(GOOD.replace("  lr: 0.1\n", "  lr: 0.1\n" + keys))

    lines = refused([str(good)]).splitlines()

    assert len(lines) == 11
    assert [f"wrong{index}" in line for index, line in enumerate(lines[:10])] == [True] * 10
    assert lines[-1] == "error: … and 4 more"


def run_module(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, "kfac_dist", "train", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.mark.parametrize("new", ["batch_size: many", "batch_size: 64\n  sedd: 1", "batch_size: [64"])
def test_a_real_process_exits_with_2(good: Path, new: str) -> None:
    good.write_text(GOOD.replace("batch_size: 64", new))

    ended = run_module(str(good))

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"error: {good}:1")
    assert len(ended.stderr.splitlines()) == 1


def test_every_rank_of_a_launcher_exits_with_2_and_one_of_them_speaks(good: Path) -> None:
    good.write_text(GOOD.replace("batch_size: 64", "batch_size: many"))
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")

    ended = run_module(str(good), launcher=launcher)

    assert ended.returncode == 1  # the launcher's own code
    assert ended.stderr.count("train.batch_size: found 'many', expected a whole number >= 1") == 1
    assert ended.stderr.count("exitcode  : 2") == 2, ended.stderr
