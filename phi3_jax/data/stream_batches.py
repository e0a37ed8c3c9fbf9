"""The batches of a stream, in order, with the place in the data before each of them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from phi3_jax.data.batches import Batch, Batches, BatchPlan, fill, pad
from phi3_jax.data.blocks import Block, Blocks
from phi3_jax.data.dataset import Split
from phi3_jax.data.masks import Example
from phi3_jax.data.packing import Part
from phi3_jax.data.row_streams import Position, Share
from phi3_jax.data.stream import Stream

# Of how many steps the position is remembered: batches are built ahead of the step that is saved.
REMEMBERED = 16


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of a micro-batch this process reads.

    Attributes:
        share: its share of the data.
        places: for each row of the global micro-batch, the row of this process's that fills it.
            Those of other processes are filled too, so that shapes and counts are those of the
            whole; they are never sent to a device.
    """

    share: Share
    places: tuple[int, ...]

    @property
    def own(self) -> int:
        """Rows of this process."""
        return max(self.places) + 1


class StreamBatches:
    """The global batch of each training step; see `Batches`.

    Steps are asked for in order. Another step than the next one is found by reading again from the
    nearest known position before it.

    Args:
        stream: what is streamed.
        plan: how examples become batches.
        seed: seed of the order.
        rows: which rows this process reads.

    Attributes:
        pace: says in a line how long an epoch is.
    """

    pace = "streamed"
    steps_per_epoch = 1  # not known; `max_steps` is set, which overrides epochs

    def __init__(self, stream: Stream, plan: BatchPlan, seed: int, rows: Rows) -> None:
        self._stream, self._plan, self._seed, self._rows = stream, plan, seed, rows
        self._start: tuple[int, Position | None] = (0, None)
        self._step: int | None = None
        # Of recent steps: where their batch begins, and their `counts`.
        self._positions: collections.OrderedDict[int, Position | None] = collections.OrderedDict()
        self._counts: dict[int, collections.Counter[str]] = {}
        self._ahead = _Ahead(stream, rows.share)
        self._block: Block | None = None
        self._order: Sequence[Sequence[Part]] = ()
        self._row = 0
        self._left_out: collections.Counter[str] = collections.Counter()

    def __getitem__(self, step: int) -> Batch:
        """The batch for step `step`, counted from 0.

        Returns:
            As `Batches`. With several shares, all rows are as long as `max_length`, for the
            processes must agree on the shape.

        Raises:
            UserError: a bad row, or data that cannot be read.
        """
        if step != self._step:
            self._restart(step)
        plan, own = self._plan, self._rows.own
        self._positions[step] = self._position()
        parts = self._counts[step] = collections.Counter()
        filled = [self._next_row(parts) for _ in range(plan.accumulation * own)]
        self._step = step + 1
        parts.update(self._left_out)
        while len(self._positions) > REMEMBERED:
            oldest, _ = self._positions.popitem(last=False)
            del self._counts[oldest]
        alone = self._rows.share.count == 1
        multiple = plan.pad_to_multiple_of if alone else plan.max_length
        batch = pad(filled, len(filled), multiple, plan.max_length)
        shape, places = (plan.accumulation, own, -1), np.array(self._rows.places)
        return {name: array.reshape(shape)[:, places] for name, array in batch.items()}

    @property
    def share(self) -> Share:
        """The share of the data that this process reads."""
        return self._rows.share

    def seek(self, step: int, position: Position | None) -> None:
        """Begin at a step whose position is known from a checkpoint."""
        self._start = (step, position)

    def position(self, step: int) -> Position | None:
        """Where the batch of a step begins, for one of the last steps; JSON values.

        That of the step of `seek` is known before any batch is read.
        """
        if step == self._step:
            return self._position()
        return self._known()[step]

    def epoch(self, steps: int) -> float:
        """How often every source was read to its end before the batch of the last step began."""
        position = self._positions.get(steps - 1)
        if position is None:
            return 0.0
        return float(min(source["at"]["epoch"] for source in position["block"]["sources"]))

    def counts(self, step: int) -> dict[str, int]:
        """For the metrics of a recent step: examples of each source, and rows left out so far."""
        return dict(self._counts[step])

    def close(self) -> None:
        """End the worker processes."""
        self._ahead.close()

    def _position(self) -> Position | None:
        if self._block is None:
            return None
        place = {"block": self._block.position, "row": self._row}
        return place | {"left_out": dict(self._left_out)}

    def _known(self) -> dict[int, Position | None]:
        return dict([self._start]) | self._positions

    def _restart(self, step: int) -> None:
        known = self._known()
        first = max((other for other in known if other <= step), default=0)
        position = known.get(first)
        self._positions.clear()
        self._counts.clear()
        self._block, self._order, self._row = None, (), 0
        self._left_out = collections.Counter()
        self._ahead.restart(position["block"] if position else None)
        if position is not None:
            self._advance()
            self._row = int(position["row"])
            # Of this block and all before it; older checkpoints lack them.
            self._left_out = collections.Counter(position.get("left_out", self._left_out))
        self._step = first
        while self._step < step:
            self[self._step]

    def _advance(self) -> None:
        block = self._block = self._ahead.take()
        skipped, held_out = block.report.skipped, block.report.held_out
        self._left_out += collections.Counter(skipped_rows=skipped, held_out_rows=held_out)
        seed = np.random.SeedSequence([self._seed, block.position["number"]]).generate_state(1)
        # Within a block, everything is as for data that is not streamed.
        whole = self._plan.train_batches(block.examples, int(seed[0]))
        self._order, self._row = whole.rows(0), 0

    def _next_row(self, counts: collections.Counter[str]) -> list[Example]:
        while self._block is None or self._row == len(self._order):
            self._advance()
        block, parts = self._block, self._order[self._row]
        self._row += 1
        names = self._stream.names
        if len(names) > 1:
            rows = block.examples.rows[[example for example, _, _ in parts]]
            counts.update(
                f"examples/{names[i]}" for i in np.searchsorted(block.ends, rows, side="right")
            )
        strategy = self._plan.packing_strategy if self._plan.packing else "bfd"
        return fill(block.examples, parts, strategy)


class _Ahead:
    """The blocks of a stream, the next of which is made while the last one is used."""

    def __init__(self, stream: Stream, share: Share) -> None:
        self._stream, self._share = stream, share
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._blocks: Blocks | None = None
        self._next: Future[Block] | None = None

    def restart(self, position: Position | None) -> None:
        """Begin at a block's position."""
        self._end()
        self._blocks = Blocks(self._stream, self._share, position)
        self._next = self._thread.submit(next, self._blocks)

    def take(self) -> Block:
        """The next block."""
        assert self._next is not None and self._blocks is not None
        block = self._next.result()
        self._next = self._thread.submit(next, self._blocks)
        return block

    def close(self) -> None:
        """End the worker processes and the thread."""
        self._end()
        self._thread.shutdown()

    def _end(self) -> None:
        blocks, self._blocks = self._blocks, None
        if blocks is not None:
            blocks.stop()
            if self._next is not None:
                self._next.cancel()
                with contextlib.suppress(Exception):  # of a block that nobody uses
                    self._next.result()
            blocks.close()


@contextlib.contextmanager
def open_batches(
    split: Split, plan: BatchPlan, seed: int, rows: Rows
) -> Iterator[Batches | StreamBatches]:
    """The batches of a run's training data.

    Args:
        split: the training data.
        plan: how examples become batches.
        seed: seed of the order.
        rows: which rows of a streamed micro-batch this process reads.
    """
    if split.stream is None:
        yield plan.train_batches(split.examples, seed)
        return
    with contextlib.closing(StreamBatches(split.stream, plan, seed, rows)) as batches:
        yield batches
