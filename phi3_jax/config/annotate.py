"""A config file with the meaning of each key in it, for people who edit it."""

from __future__ import annotations

import re
import textwrap

from phi3_jax.config.run import SECTIONS

COLUMNS = 100
_SECTION = re.compile(r"(\w+):\s*(#.*)?")
_KEY = re.compile(r"  (\w+):.*")


def annotate(text: str) -> str:
    """Add what each key of a YAML config is, as comments.

    The comment is the first sentence of the key's description in docs/config.md. Keys that already
    have a comment, at the end of the line or above it, keep theirs.

    Args:
        text: a config with one key per line, as the shipped ones.
    """
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        if found := _SECTION.fullmatch(line):
            section = found[1]
        elif (found := _KEY.fullmatch(line)) and not _has_comment(line, lines):
            lines += _with_comment(line, _meaning(section, found[1]))
            continue
        lines.append(line)
    return "\n".join(lines) + "\n"


def _has_comment(line: str, before: list[str]) -> bool:
    return " #" in line or bool(before and before[-1].lstrip().startswith("#"))


def _meaning(section: str, key: str) -> str:
    description = str(SECTIONS[section].model_fields[key].description)
    sentence = re.split(r"(?<=[a-z0-9)`])\. ", description)[0]
    return sentence.replace("`", "").rstrip(".:")


def _with_comment(line: str, meaning: str) -> list[str]:
    at_the_end = f"{line}  # {meaning}"
    if len(at_the_end) <= COLUMNS:
        return [at_the_end]
    return [*(f"  # {part}" for part in textwrap.wrap(meaning, COLUMNS - 4)), line]
