"""The configurations that a data set's card names: `configs` in the header of its README.md.

A repository says there which files belong to which configuration and split. `datasets` resolves
their patterns here too, so that a downloaded folder has the rows that its hub id has.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml
from datasets import data_files

from phi3_jax.data.json_file import WRAPPERS
from phi3_jax.errors import UserError

CARD, STANDALONE = "README.md", ".huggingface.yaml"
_HEADER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# Keys that change how `datasets` reads a file's bytes. Others describe the data only.
READING = frozenset(
    "sep delimiter header names column_names index_col usecols dtype skiprows nrows na_values "
    "keep_default_na quotechar quoting escapechar comment encoding skipfooter doublequote "
    "thousands decimal lineterminator field columns filters".split()
)


@dataclasses.dataclass(frozen=True)
class Card:
    """The configurations of a data set, at least one.

    Attributes:
        path: the data set, for errors.
        root: where its files are, for `datasets`: an absolute path or a URL.
        prefix: what the names of files found there begin with.
        configs: what each configuration says, by its name.
    """

    path: str
    root: str
    prefix: str
    configs: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(
        cls, path: str, root: str, prefix: str, text_of: Callable[[str], str | None]
    ) -> Card | None:
        """The card of a folder; None if it names no configurations.

        Args:
            path: the data set, for errors.
            root: its absolute path or URL.
            prefix: what the names of its files begin with.
            text_of: the text of a file in it, None if there is none.

        Raises:
            UserError: the card is damaged.
        """
        header = _HEADER.match(text_of(CARD) or "")
        said = _mapping(path, CARD, header[1] if header else "")
        said |= _mapping(path, STANDALONE, text_of(STANDALONE) or "")
        entries = said.get("configs")
        if not entries:
            return None
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("config_name"), str | int)
            for entry in entries
        ):
            raise UserError(f"{path}: {CARD}: configs: expected a list of items with config_name")
        return cls(path, root, prefix, {str(entry["config_name"]): entry for entry in entries})

    def splits(self, name: str | None) -> dict[str, list[PurePosixPath]]:
        """The files of each split of a configuration, relative to the folder.

        Raises:
            UserError: no such configuration, none named where several exist and none is the
                default, a file that is missing, or a key that is not honored.
        """
        name = self._chosen(name)
        config = self.configs[name]
        where = f"{self.path}: {CARD}: config {name!r}"
        root = self.root
        if folder := config.get("data_dir"):
            root = f"{root}/{str(folder).strip('/')}"
        try:
            if config.get("data_files") is None:
                patterns = data_files.get_data_patterns(root)
            else:
                patterns = data_files.sanitize_patterns(config["data_files"])
            found = {
                str(split): [file for pattern in own for file in self._files(pattern, root)]
                for split, own in patterns.items()
            }
        except (ValueError, TypeError, AttributeError, OSError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise UserError(f"{where}: {first_line}") from None
        for key in sorted(READING & config.keys()):
            if not _is_usual(key, config[key], [file for own in found.values() for file in own]):
                raise UserError(
                    f"{where} sets {key}: {config[key]!r}, which is not honored here; convert its "
                    "files, or name them in data.path if they are read without it"
                )
        return found

    def _chosen(self, name: str | None) -> str:
        """The name of the configuration that is asked for, or of the default one."""
        names = ", ".join(self.configs)
        if name is not None:
            if name not in self.configs:
                raise UserError(f"{self.path}: no configuration {name!r}; data.name: {names}")
            return name
        default = [
            own
            for own, config in self.configs.items()
            if len(self.configs) == 1 or own == "default" or config.get("default")
        ]
        if len(default) > 1:
            raise UserError(f"{self.path}: {CARD}: several default configs: {', '.join(default)}")
        if not default:
            raise UserError(
                f"{self.path}: it has several configurations and none is the default; choose one "
                f"with data.name: {names} (in data.test_path, give one of its files or folders)"
            )
        return default[0]

    def _files(self, pattern: str, root: str) -> list[PurePosixPath]:
        """The files that match a pattern; a pattern with wildcards may match none."""
        if ".." in PurePosixPath(pattern).parts or "://" in pattern or pattern.startswith("/"):
            raise ValueError(f"{pattern} is not a file in this folder")
        try:
            found = data_files.resolve_pattern(pattern, root)
        except FileNotFoundError:
            if glob.has_magic(pattern):
                return []
            raise FileNotFoundError(f"no file {pattern}") from None
        return [PurePosixPath(self._relative(file)) for file in found]

    def _relative(self, file: str) -> str:
        if not file.startswith(self.prefix):
            file = file.partition("://")[2]
        return file.removeprefix(self.prefix).lstrip("/")


def local_card(path: str, folder: os.PathLike[str]) -> Card | None:
    """The card of a local folder; None if it names no configurations.

    Raises:
        UserError: the card is damaged.
    """
    root = os.path.abspath(folder)

    def text_of(name: str) -> str | None:
        try:
            with open(os.path.join(root, name), encoding="utf-8-sig", errors="replace") as file:
                return file.read()
        except OSError:
            return None

    return Card.read(path, glob.escape(root), root, text_of)


def _mapping(path: str, name: str, text: str) -> dict[str, Any]:
    try:
        said = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first_line = str(error).strip().replace("\n", " ")
        raise UserError(f"{path}: {name}: not valid YAML ({first_line})") from None
    return said if isinstance(said, dict) else {}


def _is_usual(key: str, value: Any, files: list[PurePosixPath]) -> bool:
    """Whether a key says how these files are read anyway."""
    if key in ("sep", "delimiter"):
        tabs = [".tsv" in file.suffixes for file in files]
        return value is None or (all(tabs) if value == "\t" else value == "," and not any(tabs))
    if key == "field":
        return value is None or value in WRAPPERS
    usual = {"header": "infer", "quotechar": '"', "quoting": 0, "doublequote": True, "decimal": "."}
    if key == "encoding":
        return value is None or str(value).lower().replace("-", "") == "utf8"
    return value is None or value == usual.get(key)
