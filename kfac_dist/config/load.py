"""A run's configuration: YAML file, its includes, overrides → `Config`, and back to YAML.

include: base.yaml           a file or a list; relative to the including file; later wins, mappings merge
train.steps=100              an override: as if it were written in a last file
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from kfac_dist.config.document import Document, Dumper, parse, parse_override, show
from kfac_dist.config.explain import config_error
from kfac_dist.config.schema import Config
from kfac_dist.config.shipped import find_config, meant
from kfac_dist.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = (), *, top: Iterable[Document] = ()) -> Config:
    """Read, merge and check a run's configuration.

    Args:
        path: A YAML file, or the name of a shipped run.
        overrides: `section.key=value`, each value as YAML; later ones win.
        top: Documents that win over everything else, such as a command's own options.

    Raises:
        ConfigError: One line for each mistake: place, dotted path, value found, values allowed.
    """
    return merged(read_document(find_config(Path(path))), overrides, top=top)


def merged(document: Document, overrides: Sequence[str] = (), *, top: Iterable[Document] = ()) -> Config:
    """Merge and check a configuration that has been read; see `load_config`.

    Raises:
        ConfigError: One line for each mistake.
    """
    problems = []
    for argument in overrides:
        try:
            document = document.merged_with(parse_override(argument))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    for layer in top:
        document = document.merged_with(layer)
    try:
        return Config.model_validate(document.values)
    except ValidationError as error:
        raise config_error(error, document) from None


def resolve(config: Config) -> Config:
    """Fill in what follows from other values: the curvature's likelihood and loss terms, from the loss."""
    loss = config.loss.name
    curvature = config.kfac.curvature.model_copy(
        update={"likelihood": loss.likelihood, "loss_terms": loss.loss_terms},
    )
    return config.model_copy(update={"kfac": config.kfac.model_copy(update={"curvature": curvature})})


def dump_yaml(config: Config) -> str:
    """Write a configuration as YAML that loads to an equal one, every default spelled out."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_document(path: Path) -> Document:
    """Read a file on top of what it includes, unchecked.

    Raises:
        ConfigError: A file can't be read, or is no YAML that a configuration can be.
    """
    return _read(path, ())


def _read(path: Path, including: tuple[Path, ...], included_at: str = "") -> Document:
    """Read one file on top of what it includes; `including` are the files that led here."""
    if path.resolve() in [file.resolve() for file in including]:
        chain = " → ".join(str(file) for file in (*including, path))
        raise ConfigError(f"{included_at}include: files include each other: {chain}")
    document = parse(_text(path, included_at), str(path))
    if "include" not in document.values:
        return document
    place = f"{document.place(('include',))}: "
    names = document.values.pop("include")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{place}include: found {show(names)}, expected a file name or a list of file names")
    base: Document | None = None
    for name in names:
        layer = _read(path.parent / name, (*including, path), place)
        base = layer if base is None else base.merged_with(layer)
    return document if base is None else base.merged_with(document)


def _text(path: Path, included_at: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{included_at}{path}: no such file{meant(path)}") from None
    except OSError as error:
        raise ConfigError(f"{included_at}{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}): save the file as UTF-8") from error
