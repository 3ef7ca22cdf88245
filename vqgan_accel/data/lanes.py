"""Which rows of a stream are seen when: on every number of processes, and after every resume, the same.

A stream's files (shards) are dealt out to lanes, and a process reads the lanes that its samples come from. What a lane
gives depends on neither the number of processes nor that of workers: its files in an order by (seed, lane, pass), their
rows in blocks that are shuffled by (seed, lane, pass, block). Sample m of an accumulation round comes from lane
m mod L, so that P processes train what one trains wherever P divides the number of lanes L. A run keeps the lanes that
it began with (`lanes_of`). A checkpoint keeps where the current block of each lane begins, as `datasets` tells it; a
resumed run reads that block again, not all before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

from vqgan_accel.data.background import ahead
from vqgan_accel.data.stream import MAX_ROWS, Row, StreamSource
from vqgan_accel.randomness import STREAM_BLOCK, STREAM_ORDER, generator

MAX_LANES = 64  # unless there are more processes: each is a file that is open at the same time


class Mark(NamedTuple):
    """A place in a lane: where a block of rows begins, and how many of them were given. As a dict it is what a
    checkpoint's stream.json has of the lane."""

    epoch: int  # passes before
    block: int  # blocks before, in this pass
    size: int  # rows of the block where the pass has as many: of the run that began it, whatever data.shuffle_buffer is
    place: int = 0  # of its first row's shard, in the order of this pass
    row: int = 0  # which one that is, in its shard
    shard: dict[str, Any] | None = None  # how `datasets` finds that row again; None: it is the shard's first
    first: int = 0  # rows that the lane gave before the block
    skip: int = 0  # rows that it gave of the block


class Block(NamedTuple):
    """A shuffle buffer's worth of rows, as they are stored."""

    begin: Mark
    rows: list[Row]


class Shard:
    """A file's rows from one of them on, and which one comes next."""

    def __init__(self, source: StreamSource, number: int, row: int = 0, state: dict[str, Any] | None = None) -> None:
        """`state`: what `state` was where `row` came next."""
        self.number = number
        self.row = row
        self.state = state
        self.stream = source.shard(number)
        if state is not None:
            self.stream.load_state_dict(state)
        self.cells = source.cells(number, self.stream)

    def take(self, count: int, epoch: int) -> list[Row]:
        """The next `count` rows, fewer only where the file ends."""
        start = self.number * MAX_ROWS + self.row
        rows = [Row(epoch, start + place, cell) for place, cell in enumerate(islice(self.cells, count))]
        self.row += len(rows)
        return rows

    def keep_place(self) -> None:
        """A block may begin here."""
        self.state = self.stream.state_dict()


class Lane:
    """Every num_lanes-th shard, over and over: an endless sequence of rows.

    `state` is one of another lane's `state_at`; the lane then begins with the same row as that one at that count.
    """

    def __init__(
        self,
        source: StreamSource,
        seed: int,
        number: int,
        num_lanes: int,
        block_size: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.source = source
        self.seed = seed
        self.number = number
        self.shards = range(number, source.num_shards, num_lanes)
        self.block_size = block_size
        self.begin = Mark(**state) if state else Mark(0, 0, block_size)
        self.start = self.begin.first + self.begin.skip  # rows given before
        self.marks: deque[Mark] = deque()  # of the blocks that a checkpoint may still ask for

    def __iter__(self) -> Iterator[Row]:
        skip = self.begin.skip
        for begin, rows in self._blocks():
            self.marks.append(begin)
            rng = generator(STREAM_BLOCK, self.seed, self.number, begin.epoch, begin.block)
            order = rng.permutation(len(rows))
            yield from (rows[place] for place in order[skip:])
            skip = 0

    def state_at(self, count: int) -> dict[str, Any]:
        """Where the lane stood when it had given `count` rows in all; earlier counts are forgotten."""
        while len(self.marks) > 1 and self.marks[1].first <= count:
            self.marks.popleft()
        mark = self.marks[0] if self.marks else self.begin
        return mark._replace(skip=count - mark.first)._asdict()

    def _blocks(self) -> Iterator[Block]:
        """Of all passes, from self.begin on."""
        begin = self.begin
        while True:
            given = begin.first
            for block in self._blocks_of_pass(begin):
                yield block
                given = block.begin.first + len(block.rows)
            if given == begin.first and begin.place == begin.row == 0:
                names = ", ".join(str(shard) for shard in self.shards[:10])
                raise ValueError(f"{self.source.title} has no rows in the shards {names}; remove empty files")
            begin = Mark(begin.epoch + 1, 0, self.block_size, first=given)

    def _blocks_of_pass(self, begin: Mark) -> Iterator[Block]:
        """Of the pass in which `begin` lies, from there on. A block may reach over the ends of shards."""
        order = generator(STREAM_ORDER, self.seed, self.number, begin.epoch).permutation(len(self.shards))
        mark, rows = begin, list[Row]()
        for place in range(begin.place, len(order)):
            row, state = (begin.row, begin.shard) if place == begin.place else (0, None)
            shard = Shard(self.source, self.shards[order[place]], row, state)
            while True:
                if not rows:
                    mark = mark._replace(place=place, row=shard.row, shard=shard.state)
                rows += shard.take(mark.size - len(rows), begin.epoch)
                if len(rows) < mark.size:
                    break  # the shard is at its end
                yield Block(mark, rows)
                shard.keep_place()
                mark = mark._replace(size=self.block_size, block=mark.block + 1, first=mark.first + len(rows))
                rows = []
        if rows:
            yield Block(mark, rows)


class StreamOrder:
    """A batch sampler: one process's micro-batches of the steps start_step .. total_steps - 1, with their rows.

    ValueError where there are fewer shards than processes, or where the lanes of `states` fit neither the data nor the
    batch nor the processes.
    """

    def __init__(
        self,
        source: StreamSource,
        seed: int,
        total_batch_size: int,
        num_rounds: int,
        process_index: int,
        num_processes: int,
        start_step: int,
        total_steps: int,
        shuffle_buffer: int,
        states: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.round_size = total_batch_size // num_rounds
        if states:
            self.num_lanes = lanes_to_go_on_with(source, states, self.round_size, num_processes)
        else:
            self.num_lanes = lanes_to_begin_with(source, self.round_size, num_processes)
        self.process_index = process_index
        self.num_processes = num_processes
        self.num_rounds = num_rounds
        self.start_step = start_step
        self.total_steps = total_steps
        self.seed = seed
        block = max(1, shuffle_buffer // self.num_lanes)
        self.lanes = {
            number: Lane(source, seed, number, self.num_lanes, block, (states or {}).get(str(number)))
            for number in range(process_index, self.num_lanes, num_processes)
        }
        self.rounds_ahead = max(1, shuffle_buffer // self.round_size)

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.num_rounds

    def __iter__(self) -> Generator[list[Row], None, None]:
        with closing(ahead(self._rounds(), self.rounds_ahead)) as rounds:
            yield from rounds

    def _rounds(self) -> Iterator[list[Row]]:
        rows = {number: iter(lane) for number, lane in self.lanes.items()}
        mine = range(self.process_index, self.round_size, self.num_processes)
        for _ in range(len(self)):
            yield [next(rows[sample % self.num_lanes]) for sample in mine]

    def states_at(self, step: int) -> dict[str, dict[str, Any]]:
        """Lane -> where it stands after `step` optimizer steps; of this process's lanes."""
        given = (step - self.start_step) * self.num_rounds * self.round_size // self.num_lanes  # by each lane, since
        return {str(number): lane.state_at(lane.start + given) for number, lane in self.lanes.items()}


def lanes_of(num_shards: int, round_size: int, num_processes: int) -> int:
    """The largest divisor of `round_size` that is a multiple of the processes and no more than the shards and, where
    there are no more processes than that, MAX_LANES. `num_processes` divides `round_size` and is no more than the
    shards."""
    most = min(num_shards, max(MAX_LANES, num_processes))
    return max(lanes for lanes in range(num_processes, most + 1, num_processes) if round_size % lanes == 0)


def lanes_to_begin_with(source: StreamSource, round_size: int, num_processes: int) -> int:
    if source.num_shards < num_processes:
        raise ValueError(
            f"{source.title} has {source.num_shards} shards, fewer than the {num_processes} processes, and no two "
            f"processes read the same file; write the data in at least {num_processes} files, use at most "
            f"{source.num_shards} processes, or set data.streaming=false"
        )
    return lanes_of(source.num_shards, round_size, num_processes)


def lanes_to_go_on_with(
    source: StreamSource, states: dict[str, dict[str, Any]], round_size: int, num_processes: int
) -> int:
    """Those that the run began with, on however many processes that was."""
    lanes = len(states)
    read = f"the checkpoint's stream is read in {lanes} lanes"
    if lanes > source.num_shards or states.keys() != {str(lane) for lane in range(lanes)}:
        raise ValueError(f"{read}, and {source.title} has {source.num_shards} shards; resume with the same data")
    if round_size % lanes:
        raise ValueError(
            f"{read}, which do not divide the {round_size} images of a round; resume with training.total_batch_size / "
            f"training.gradient_accumulation_steps a multiple of {lanes}"
        )
    if lanes % num_processes:
        fitting = [str(number) for number in range(1, lanes + 1) if lanes % number == 0]
        raise ValueError(
            f"{read}, which {num_processes} processes cannot share out; resume on {', '.join(fitting)} processes"
        )
    return lanes
