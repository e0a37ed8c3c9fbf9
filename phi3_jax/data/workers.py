"""Tokenize chunks in worker processes, or in this one; the results are the same bytes.

The workers are started as a program of their own and not by `multiprocessing`: forking a process
that runs JAX may deadlock, and its other ways to start run the user's script again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from phi3_jax.data.chunks import Chunk, ChunkReader
from phi3_jax.data.encoder import Encoder, EncoderSettings
from phi3_jax.data.tokenizer import digest_tokenizer
from phi3_jax.errors import UserError

# SIGINT is meant for the run, which then closes the pipe; a job's scheduler sends it to all.
START = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from phi3_jax.no_torch import without_torch
with without_torch():
    from phi3_jax.data.worker import main
main()
"""


def encode_chunks(
    chunks: Iterable[Chunk],
    tokenizer: PreTrainedTokenizerBase,
    settings: EncoderSettings,
    workers: int,
    directory: Path,
) -> Generator[pa.RecordBatch, None, None]:
    """The rows of each chunk, in order, as batches of `encoder.SCHEMA`.

    Args:
        chunks: what to tokenize.
        tokenizer: the checkpoint's tokenizer.
        settings: what decides a row's tokens.
        workers: number of worker processes; 1 or less tokenizes in this process.
        directory: an empty folder for what the processes exchange.

    Raises:
        UserError: a row needs what the tokenizer lacks, or a worker died.
    """
    if workers > 1:
        with contextlib.ExitStack() as stack:
            pool = [
                stack.enter_context(_Worker(tokenizer, settings, directory / "tokenizer"))
                for _ in range(workers)
            ]
            # A tokenizer that changes when it is saved is used where it is.
            if {worker.digest() for worker in pool} == {digest_tokenizer(tokenizer)}:
                yield from _by_workers(chunks, pool, directory)
                return
    encoder, reader = Encoder(tokenizer, settings), ChunkReader()
    for chunk in chunks:
        yield encoder.encode(reader.read(chunk))


def _by_workers(
    chunks: Iterable[Chunk], pool: list[_Worker], directory: Path
) -> Iterator[pa.RecordBatch]:
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in pool:
        idle.put(worker)

    def encode(chunk: Chunk, out: Path) -> Path:
        worker = idle.get()
        try:
            worker.ask({"chunk": dataclasses.asdict(chunk), "out": str(out)})
        finally:
            idle.put(worker)
        return out

    pending: collections.deque[Future[Path]] = collections.deque()
    with ThreadPoolExecutor(len(pool)) as threads:
        try:
            for number, chunk in enumerate(chunks):
                pending.append(threads.submit(encode, chunk, directory / f"{number}.arrow"))
                # Enough ahead that no worker waits; the files of all chunks would fill the disk.
                if len(pending) > 4 * len(pool):
                    yield _take(pending.popleft().result())
            while pending:
                yield _take(pending.popleft().result())
        finally:
            for future in pending:
                future.cancel()


def _take(file: Path) -> pa.RecordBatch:
    """The batch in a worker's file, which is removed. Read and not mapped, so memory stays flat."""
    with pa.OSFile(str(file), "rb") as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    file.unlink()
    return batch


class _Worker:
    """A process of `phi3_jax.data.worker`; it ends with the `with` block."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, settings: EncoderSettings, folder: Path
    ) -> None:
        if not folder.exists():
            tokenizer.save_pretrained(str(folder))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C would come before it is ignored
        )
        self._send(
            {
                "tokenizer": str(folder),
                "chat_template": tokenizer.chat_template,
                "settings": dataclasses.asdict(settings),
            }
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self._process.kill()
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def digest(self) -> str:
        """The digest of the worker's tokenizer, its first answer."""
        return str(self._receive()["digest"])

    def ask(self, task: dict[str, Any]) -> None:
        """Have one task done.

        Raises:
            UserError: the worker says so, or it died.
        """
        self._send(task)
        self._receive()

    def _send(self, said: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says so
            self._process.stdin.write(json.dumps(said) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            reason = " (out of memory?)" if code == -9 else ""
            raise UserError(
                f"a process that tokenizes died with code {code}{reason}; data.dataset_num_proc "
                "sets their number, and 1 tokenizes in the main process"
            )
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise UserError(said["error"])
        return said
