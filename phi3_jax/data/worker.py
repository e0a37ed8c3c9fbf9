"""A worker process, which tokenizes chunks; `workers` starts it.

It reads one JSON object per line from its standard input and answers each with one line: first
the tokenizer and the settings, then a chunk at a time. The tokens go into a file that the task
names. The process ends when its input does. It does not import JAX.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

import pyarrow as pa

from phi3_jax.data.chunks import Chunk, ChunkReader
from phi3_jax.data.encoder import SCHEMA, Encoder, EncoderSettings
from phi3_jax.data.tokenizer import digest_tokenizer, load_tokenizer
from phi3_jax.errors import UserError


def main() -> None:
    """Answer until the input ends."""
    # A library that prints must not garble the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        serve(sys.stdin, answers)
    except BrokenPipeError:
        pass  # the main process is gone


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer each request with a line."""
    setup = json.loads(next(iter(requests)))
    tokenizer = load_tokenizer(setup["tokenizer"])
    tokenizer.chat_template = setup["chat_template"]
    encoder = Encoder(tokenizer, EncoderSettings(**setup["settings"]))
    _answer(answers, {"digest": digest_tokenizer(tokenizer)})
    reader = ChunkReader()
    for line in requests:
        task = json.loads(line)
        try:
            batch = encoder.encode(reader.read(Chunk(**task["chunk"])))
        except UserError as error:
            _answer(answers, {"error": str(error)})
            continue
        with pa.OSFile(task["out"], "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            writer.write_batch(batch)
        _answer(answers, {"rows": batch.num_rows})


def _answer(answers: TextIO, said: dict[str, Any]) -> None:
    answers.write(json.dumps(said) + "\n")
    answers.flush()
