"""Broken input of every kind, and what a command may do with it: work, or refuse in a line.

The `dice` of each function is a `random.Random`, or Hypothesis' own, which then can shrink what it
chose. The tests give a few hundred inputs, `benchmarks/faults.py` as many as there is time for.
"""

from __future__ import annotations

import bz2
import contextlib
import copy
import gzip
import json
import math
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lora_flax import LoraError
from phi3_jax.errors import UserError

# What no key, field or cell should hold; each has been a traceback in some program.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0,
    1e-320, 1e308, math.nan, math.inf, -math.inf, "", " ", "0", "1e-4", "nan", "auto", "none",
    "all-linear", "\0", "\ud800", "\x1b[2J", "é" * 50, "x" * 5000, "(", "[a-", "../x", "/dev/null",
    "/", ".", "~", "1:30", "2024-01-01", "0o17", [], [None], [[]], [0, "a"], ["x"] * 100, {},
    {"": None}, {"a": {"b": [1]}}, {"x" * 300: 1},
]  # fmt: skip
SECONDS = 30
MEMORY = 4 * 2**30


class Hang(Exception):
    """An input took more than `SECONDS` of the processor's time."""


def outcome(function: Callable[[], object]) -> str:
    """`worked` or `refused`; anything else a program might do with its input is raised.

    Raises:
        AssertionError: a refusal of many lines.
        Hang, MemoryError, Exception: what a user must never see.
    """
    try:
        with _limits():
            function()
    except (UserError, LoraError) as error:
        lines = str(error).splitlines()
        assert 1 <= len(lines) <= 12 and "Traceback" not in str(error), f"not one line: {error}"
        assert len(str(error)) < 20_000, f"{len(str(error))} characters: {str(error)[:300]}"
        return "refused"
    return "worked"


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Hang(f"no answer after {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # Not the alarm, which the time limit of chat templates takes.
    former = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)


def change_value(dice: Random, value: Any) -> Any:
    """A copy of a JSON value with one to three changes anywhere in it."""
    root = [copy.deepcopy(value)]
    for _ in range(dice.randint(1, 3)):
        places = list(_places(root))
        holder, key = places[dice.randrange(len(places))]
        kind = dice.randrange(8)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[dice.choice(["", key + "x", key.upper(), "\0", "__class__"])] = holder[key]
        elif kind == 2:
            holder[key] = [holder[key]] * dice.choice([0, 1, 3])
        elif kind == 3:
            holder[key] = to_json(holder[key])
        elif kind == 4:
            deep: Any = 0
            for _ in range(dice.choice([50, 980, 3000])):
                deep = [deep] if dice.randrange(2) else {"a": deep}
            holder[key] = deep
        elif kind == 5 and isinstance(holder[key], (int, float)):
            holder[key] = holder[key] * dice.choice([-1, 0, 2, 1000, 10**12, 0.5])
        else:
            holder[key] = copy.deepcopy(dice.choice(ODD))
    return root[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every dictionary entry and list item of a value, shallow ones first."""
    queue = [value]
    while queue:
        here = queue.pop(0)
        items: Any = here.items() if isinstance(here, dict) else enumerate(here)
        for key, inside in list(items)[:200]:
            yield here, key
            if isinstance(inside, (dict, list)):
                queue.append(inside)


def to_json(value: Any) -> str:
    """JSON of a value that may be nested deeper than Python's encoder goes."""
    out: list[str] = []
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, _Text):
            out.append(item.text)
        elif isinstance(item, dict):
            parts: list[Any] = [_Text("{")]
            for number, (key, inside) in enumerate(item.items()):
                parts += [_Text(("," if number else "") + json.dumps(str(key)) + ":"), inside]
            stack += reversed([*parts, _Text("}")])
        elif isinstance(item, list):
            parts = [_Text("[")]
            for number, inside in enumerate(item):
                parts += ([_Text(",")] if number else []) + [inside]
            stack += reversed([*parts, _Text("]")])
        else:
            out.append(json.dumps(item))
    return "".join(out)


class _Text:
    def __init__(self, text: str):
        self.text = text


def change_bytes(dice: Random, data: bytes) -> bytes:
    """The data with flipped bits, a cut, a repeated or removed stretch, or other bytes put in."""
    if not data:
        return bytes([dice.randrange(256)])
    at, kind = dice.randrange(len(data)), dice.randrange(6)
    to = min(len(data), at + dice.choice([1, 4, 64, 1000]))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[to:]
    if kind == 2:
        return data[:at] + data[at:to] * dice.choice([2, 50]) + data[to:]
    if kind == 3:
        junk = [b"\0", b"\xff\xfe", b'"', b"{", b"[" * 3000, b"\r", b",", b"9" * 5000, b"\n\n"]
        return data[:at] + dice.choice(junk) + data[at:]
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 3, 40])):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def change_text(dice: Random, text: str, words: list[str]) -> str:
    """The text with one of the words put in, or with bytes changed."""
    if dice.randrange(2):
        return change_bytes(dice, text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    at = dice.randrange(len(text) + 1)
    return text[:at] + dice.choice(words) + text[at:]


def change_safetensors(dice: Random, data: bytes) -> bytes:
    """A safetensors file with changed bytes, a changed header, or a header of another length."""
    kind = dice.randrange(3)
    if kind == 0:
        return change_bytes(dice, data)
    (size,) = struct.unpack("<Q", data[:8])
    if kind == 1:
        size = dice.choice([0, 1, size - 1, size + 1, 2 * size, 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", size) + data[8:]
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    name = dice.choice(sorted(header))
    entry, change = header[name], dice.randrange(6)
    if change == 0:
        header[dice.choice(["", "x", name + ".x", "__metadata__"])] = header.pop(name)
    elif change == 1 and "dtype" in entry:
        entry["dtype"] = dice.choice(["F64", "I8", "BOOL", "F8_E4M3", "U64", "X", "", None])
    elif change == 2 and "shape" in entry:
        entry["shape"] = dice.choice([[], [0], entry["shape"][::-1], [2**40], [-1], [1.5], "x"])
    elif change == 3 and "data_offsets" in entry:
        entry["data_offsets"] = dice.choice([[0, 0], [0, 4], [-4, 4], [4, 0], [0, 2**62], None])
    elif change == 4:
        del header[name]
    else:
        header = change_value(dice, header)
    text = to_json(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def change_folder(dice: Random, sound: Path, folder: Path) -> Path:
    """A copy of a folder in which a file or two are damaged, edited, removed, or other things."""
    shutil.copytree(sound, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for _ in range(dice.choice([1, 1, 2])):
        file = files.pop(dice.randrange(len(files)))
        data, kind = file.read_bytes(), dice.randrange(10)
        if kind == 0:
            file.unlink()
        elif kind == 1:
            file.unlink()
            file.mkdir()
        elif file.suffix == ".safetensors":
            file.write_bytes(change_safetensors(dice, data))
        elif file.suffix == ".json" and kind < 8:
            changed = change_value(dice, json.loads(data))
            file.write_bytes(to_json(changed).encode("utf-8", "surrogatepass"))
        else:
            file.write_bytes(change_bytes(dice, data))
    return folder


ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Tea."}]},
    {"prompt": "Tell me.", "completion": "No."},
    {"instruction": "Say", "input": "x", "output": "y"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"text": "Rivers are rivers."},
    {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
            },
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
]


def data_file(dice: Random, folder: Path) -> Path:
    """A file of rows in any format, of which some are changed, and maybe bytes of the file."""
    folder.mkdir()
    rows = [copy.deepcopy(dice.choice(ROWS)) for _ in range(dice.randint(0, 4))]
    if dice.randrange(3):
        rows = [copy.deepcopy(rows[0]) for _ in rows] if rows else rows
    rows = [change_value(dice, row) if dice.randrange(3) == 0 else row for row in rows]
    ending = dice.choice([".jsonl", ".json", ".csv", ".parquet", ".arrow"])
    if ending in (".jsonl", ".json"):
        texts = [to_json(row) for row in rows]
        text = "\n".join(texts) if ending == ".jsonl" else "[" + ",".join(texts) + "]"
        if dice.randrange(6) == 0:
            text = change_text(dice, text, ["NaN", "-Infinity", "\\ud800", "// x", "{}", "null,"])
        data = text.encode("utf-8", "surrogatepass")
        if dice.randrange(12) == 0:
            data = data.decode("utf-8", "replace").encode("utf-16")
    elif ending == ".csv":
        data = _csv(rows).encode("utf-8", "surrogatepass")
    else:
        data = _table(rows, ending)
    if dice.randrange(3) == 0:
        data = change_bytes(dice, data)
    if ending != ".arrow" and dice.randrange(6) == 0:
        squeeze, suffix = dice.choice([(gzip.compress, ".gz"), (bz2.compress, ".bz2")])
        data, ending = squeeze(data), ending + suffix
        if dice.randrange(2):
            data = change_bytes(dice, data)
    file = folder / f"rows{ending}"
    file.write_bytes(data)
    return file


def _csv(rows: list[Any]) -> str:
    rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
    names = list(rows[0]) if rows else ["text"]
    lines = [",".join(map(str, names))]
    for row in rows:
        cells = [to_json(row.get(name)).replace('"', '""') for name in names]
        lines.append(",".join(f'"{cell}"' for cell in cells))
    return "\n".join(lines)


def _table(rows: list[Any], ending: str) -> bytes:
    kept = [row for row in rows if isinstance(row, dict)]
    try:
        if _depth(to_json(kept)) > 12:  # more takes Arrow for ever
            raise ValueError
        table = pa.Table.from_pylist(kept)
    except Exception:  # values of several types in a column
        names = sorted({str(name) for row in kept for name in row})
        columns = {name: [to_json(row.get(name)) for row in kept] for name in names}
        table = pa.table({name: _strings(cells) for name, cells in columns.items()})
    sink = pa.BufferOutputStream()
    if ending == ".arrow":
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        try:
            pq.write_table(table, sink)
        except Exception:  # a column of empty structs
            pq.write_table(pa.table({"text": ["a"]}), sink := pa.BufferOutputStream())
    return sink.getvalue().to_pybytes()


def _depth(text: str) -> int:
    """How deeply brackets are nested."""
    depth = deepest = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        deepest = max(deepest, depth)
    return deepest


def _strings(cells: list[str]) -> pa.Array:
    return pa.array([cell.encode("utf-8", "replace").decode() for cell in cells])


def flip_checkpoint(dice: Random, step: Path) -> None:
    """Damage one file of a run's checkpoint: flipped bits, a cut, a removed file or folder."""
    paths = sorted(step.rglob("*")) or [step]
    path = paths[dice.randrange(len(paths))]
    kind = dice.randrange(8)
    if path.is_dir():
        shutil.rmtree(path)
        if kind < 2:
            path.write_bytes(b"")
    elif kind == 0:
        path.unlink()
    elif path.name == "metadata" and kind < 5 and path.read_bytes()[:1] == b"{":
        changed = change_value(dice, json.loads(path.read_bytes()))
        path.write_bytes(to_json(changed).encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(change_bytes(dice, path.read_bytes()))
