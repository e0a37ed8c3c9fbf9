"""Every `phi3-jax` command of the README and the docs has flags and keys that exist."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex

import pytest

from phi3_jax.cli.main import COMMANDS
from phi3_jax.config.loader import load_config
from phi3_jax.config.shipped import shipped_names
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
# A synopsis, and what the shell does with a command.
SYNOPSIS = re.compile(r"\[[^\]=]*(?:\.\.\.|\||[A-Z])[^\]]*\]")
END = {"|", "||", "&&", ";", "&", ">", "<"}


def commands() -> list[tuple[str, str]]:
    """Each command with its page, without comments and what stands around it."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s#\s.*", "", line)
                for start in re.finditer(r"phi3-jax (?=[a-z])", line):
                    if not SYNOPSIS.search(line):
                        found.append((page.name, line[start.start() :]))
    return found


def arguments(command: str) -> list[str]:
    """The words of the command alone: inside quotes of another one, up to their end."""
    if command.count('"') % 2:
        command = command.partition('"')[0]
    words = []
    for word in shlex.split(command)[1:]:
        if word in END or word[:1] in (">", "<"):
            break
        words.append(word)
    return words


def test_they_are_found():
    assert len(commands()) > 50
    assert {arguments(command)[0] for _, command in commands()} == COMMANDS.keys()


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda text: text[:60])
def test_flags_and_keys_exist(page, command):
    verb, *rest = arguments(command)
    if verb == "lm-eval":
        return
    module = importlib.import_module(f"phi3_jax.cli.{COMMANDS[verb][0]}")
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(rest)
    if hasattr(args, "overrides"):
        # A file of the reader's own has keys like the quickstart's.
        known = args.config if args.config in shipped_names() else "quickstart"
        load_config(known, args.overrides)
