"""A run's configuration: YAML file, its includes, overrides → `Config`, and back to YAML.

include: base.yaml           a file or a list; relative to the including file; later wins, mappings merge
train.steps=100              an override: as if it were written in a last file
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from kfac_dist.config.schema import Config
from kfac_dist.config.section import can_be_path
from kfac_dist.config.yaml.document import MOST_VALUES, Document, Dumper, parse, parse_override, reported, show
from kfac_dist.config.yaml.explain import config_error
from kfac_dist.config.yaml.shipped import find_config, meant
from kfac_dist.config.yaml.targets import import_module
from kfac_dist.config.yaml.text import MOST_BYTES, read_text
from kfac_dist.errors import ConfigError

# Files that a configuration is made of, each counted as often as it is included.
MOST_FILES = 100


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
        raise ConfigError(reported(problems))
    for layer in top:
        document = document.merged_with(layer)
    _import_extensions(document)
    try:
        return Config.model_validate(document.values)
    except ValidationError as error:
        raise config_error(error, document) from None


def _import_extensions(document: Document) -> None:
    """Import the modules under `extensions`, which register their parts; nothing else of them is called.

    Raises:
        ConfigError: One can't be imported.
    """
    names = document.values.get("extensions")
    problems = []
    for index, name in enumerate(names if isinstance(names, list) else ()):
        if isinstance(name, str) and all(part.isidentifier() for part in name.split(".")):  # the schema refuses others
            try:
                import_module(name, f"extensions: found {show(name)}")
            except ConfigError as error:
                problems.append(f"{document.place(('extensions', index))}: {error}")
    if problems:
        raise ConfigError(reported(problems))


def resolve(config: Config) -> Config:
    """Fill in values that follow from others: the curvature's likelihood and loss terms, from the loss."""
    loss = config.loss.name
    curvature = config.kfac.curvature.model_copy(
        update={"likelihood": loss.likelihood, "loss_terms": loss.loss_terms},
    )
    return config.model_copy(update={"kfac": config.kfac.model_copy(update={"curvature": curvature})})


def dump_yaml(config: Config) -> str:
    """Write a configuration as YAML that loads to an equal one, every default spelled out."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_document(path: Path) -> Document:
    """Read a file on top of its includes, unchecked.

    Raises:
        ConfigError: A file can't be read, or is no YAML that a configuration can be.
    """
    return _Reading().read(path, ())


@dataclass
class _Reading:
    """Files of one configuration, with bounds on all of them together: files that include files may be many.

    Attributes:
        files: Read so far.
        size: Characters of them.
        values: In them.
    """

    files: int = 0
    size: int = 0
    values: int = 0

    def read(self, path: Path, including: tuple[Path, ...], included_at: str = "") -> Document:
        """Read one file on top of its includes; `including` are the files that include it."""
        if os.path.realpath(path) in map(os.path.realpath, including):
            chain = " → ".join(str(file) for file in (*including, path))
            raise ConfigError(f"{included_at}include: files include each other: {chain}")
        document = parse(self._text(path, included_at), str(path))
        self.values += len(document.places)
        self._check(path, included_at)
        if "include" not in document.values:
            return document
        place = f"{document.place(('include',))}: "
        names = document.values.pop("include")
        names = [names] if isinstance(names, str) else names
        wrong = [n for n in names if not _names_file(n)] if isinstance(names, list) else [names]
        if wrong:
            raise ConfigError(f"{place}include: found {show(wrong[0])}, expected a file name or a list of file names")
        base: Document | None = None
        for name in names:
            layer = self.read(path.parent / name, (*including, path), place)
            base = layer if base is None else base.merged_with(layer)
        return document if base is None else base.merged_with(document)

    def _text(self, path: Path, included_at: str) -> str:
        try:
            text = read_text(path)
        except FileNotFoundError:
            raise ConfigError(f"{included_at}{path}: no such file{meant(path)}") from None
        except ConfigError as error:
            raise ConfigError(f"{included_at}{error}") from error
        self.files += 1
        self.size += len(text)
        self._check(path, included_at)
        return text

    def _check(self, path: Path, included_at: str) -> None:
        for what, count, most in (
            ("files", self.files, MOST_FILES),
            ("characters", self.size, MOST_BYTES),
            ("values", self.values, MOST_VALUES),
        ):
            if count > most:
                raise ConfigError(f"{included_at}{path}: with it the configuration has more than {most:,} {what}")


def _names_file(value: object) -> bool:
    return isinstance(value, str) and bool(value) and can_be_path(value)
