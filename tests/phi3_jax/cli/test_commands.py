"""The verbs of `phi3-jax`: what they import, what they list, what they refuse."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import phi3_jax
from phi3_jax.cli.main import COMMANDS, main
from phi3_jax.config.loader import load_config
from phi3_jax.config.shipped import shipped_names
from phi3_jax.errors import UserError
from tests.conftest import CONFIGS, ROOT


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_help_imports_no_jax():
    """So that it answers at once."""
    done = python(
        "import sys\n"
        "from phi3_jax.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'jax', 'flax', 'transformers', 'datasets', 'pydantic', 'numpy'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    assert done.returncode == 0, done.stderr
    for name, (_, line) in COMMANDS.items():
        assert name in done.stdout and line in done.stdout


@pytest.fixture(scope="module")
def all_imported() -> subprocess.CompletedProcess:
    """A process that has imported every command but `lm-eval`, and then logs a line."""
    return python(
        "import sys\n"
        "from phi3_jax.cli.main import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    if name != 'lm-eval':\n"
        "        try:\n            main([name, '--help'])\n"
        "        except SystemExit as end:\n            assert end.code == 0\n"
        "import logging, transformers\n"
        "logging.getLogger('huggingface_hub').warning('the hub is far')\n"
        "assert not {name for name in sys.modules if name.partition('.')[0] == 'torch'}\n"
        "import torch, transformers.models.auto.tokenization_auto\n"
    )


def test_no_command_imports_torch(all_imported):
    """Which transformers and datasets would, where it is installed."""
    assert all_imported.returncode == 0, all_imported.stderr


def test_the_hub_warns_once(all_imported):
    """Not also by the root logger, to which Orbax's import gives a handler."""
    assert all_imported.stderr.count("the hub is far") == 1


def test_a_missing_extra_is_one_line():
    done = python(
        "import sys\n"
        "sys.modules['lm_eval'] = None\n"
        "from phi3_jax.cli.main import main\n"
        "sys.exit(main(['lm-eval', '--tasks', 'arc_easy']))\n"
    )
    assert done.returncode == 2
    assert "pip install 'phi3-jax[lm-eval]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_lora_flax_imports_nothing_of_ours_and_little_else():
    """A model that is not Phi-3 needs none of the program's libraries."""
    done = python(
        "import sys\n"
        "for name in ('transformers', 'datasets', 'huggingface_hub', 'orbax', 'pydantic', 'grain',"
        " 'torch', 'phi3_jax'):\n    sys.modules[name] = None\n"
        # Flax itself looks for orbax, and goes without.
        "import lora_flax\n"
        "print(lora_flax.LoraConfig(r=4))\n"
    )
    assert done.returncode == 0, done.stderr


def test_public_names():
    assert set(phi3_jax.__all__) <= set(dir(phi3_jax))
    for name in phi3_jax.__all__:
        assert getattr(phi3_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'gnerate'"):
        phi3_jax.gnerate  # noqa: B018


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    if name == "lm-eval":
        pytest.importorskip("lm_eval")
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out
    assert importlib.import_module(f"phi3_jax.cli.{COMMANDS[name][0]}").__doc__


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "train a.b=1 --resume c.d=2 --config q e.f=3",
            {"config": "q", "resume": True, "overrides": ["a.b=1", "c.d=2", "e.f=3"]},
        ),
        ("train --config q --resume=auto a.b=1", {"resume": "auto", "overrides": ["a.b=1"]}),
        (
            "suggest a=1 --config q --find-lr b=2 --steps 3 c=4",
            {"overrides": ["a=1", "b=2", "c=4"]},
        ),
        ("plan a=1 --topology cpu:8 b=2 --config q", {"overrides": ["a=1", "b=2"]}),
        ("preview a=1 --config q b=2", {"overrides": ["a=1", "b=2"]}),
        ("evaluate a=1 --config q b=2", {"overrides": ["a=1", "b=2"]}),
        ("generate one --model m two --top-k 3 three", {"prompts": ["one", "two", "three"]}),
        ("generate --model m -- -5 + 3?", {"prompts": ["-5", "+", "3?"]}),
        ("init --output f", {"name": "quickstart"}),
        ("init --output f phi4_lora", {"name": "phi4_lora"}),
        ("report a --output c.html b", {"folders": [Path("a"), Path("b")]}),
    ],
)
def test_options_may_stand_between_overrides(words, expected, monkeypatch):
    verb, *rest = words.split()
    given = []
    module = importlib.import_module(f"phi3_jax.cli.{COMMANDS[verb][0]}")
    monkeypatch.setattr(module, "run", lambda args: given.append(vars(args)) or 0)
    assert main([verb, *rest]) == 0
    assert {key: given[0][key] for key in expected} == expected


def test_configs_lists_what_ships(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped_names()
    assert len(lines) == len(list(CONFIGS.glob("*.yaml")))
    assert all(len(line.split()) > 3 for line in lines)


def test_a_terminal_gets_the_configs_wrapped_beside_their_names(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line[0] != " "] == shipped_names()


def test_a_reader_that_has_seen_enough(popen):
    """`phi3-jax configs | head -1`: no traceback."""
    process = popen(
        [sys.executable, "-m", "phi3_jax.cli.main", "configs"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 128 + signal.SIGPIPE


def test_control_characters_of_names_stay_out_of_the_terminal(capsys):
    assert main(["train", "--config", "\x1b[2J.yaml"]) == 2
    assert r"\x1b[2J.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", "x", "--a\x1b[2J"])
    assert ended.value.code == 2
    assert r"unrecognized arguments: --a\x1b[2J" in capsys.readouterr().err


def test_a_shipped_config_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart") == load_config(CONFIGS / "quickstart.yaml")
    with pytest.raises(UserError, match="did you mean quickstart?"):
        load_config("quikstart")
    with pytest.raises(UserError, match="no such config file"):
        load_config("missing.yaml")
    # A file of that name comes first.
    (tmp_path / "quickstart").write_text(
        "model: {path: m}\ndata: {path: d}\ntraining: {output_dir: o}"
    )
    assert load_config("quickstart").model.path == "m"


def test_init_writes_a_config_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    written = tmp_path / "quickstart.yaml"
    assert load_config(written) == load_config("quickstart")
    text = written.read_text()
    assert "  learning_rate: 2e-4  # Peak learning rate\n" in text
    assert "  # Enough for the 60 steps below" in text  # the file's own comment
    assert main(["init"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["init", "phi4_lora", "--output", str(tmp_path / "mine.yaml")]) == 0
    assert load_config("mine.yaml").model.path == "microsoft/phi-4"
    assert main(["init", "--output", str(tmp_path / "no" / "folder.yaml")]) == 2
    assert main(["init", "phi5"]) == 2
