"""A drive with a volatile cache, for tests: what may be on it after the power went, given what it was told.

`RecordingIO` performs every operation at once on the real file, and keeps the order in which operations were started
and waited for. A crash at some moment leaves

    durable     writes that were waited for before a sync of their file was started, and that sync was waited for
    optional    all other writes: whole, lost, or torn, each 512-byte sector by itself, in any order that is legal

Two writes to the same bytes keep their order if the first was waited for before the second was started.
"""

import itertools
import os
from dataclasses import dataclass

SECTOR = 512


@dataclass
class Operation:
    kind: str
    path: str
    offset: int
    data: bytes
    started: int
    waited: int | None = None


class Killed(BaseException):
    """Stands for a process that ends here."""


class PlainIO:
    """Performs everything at once, and syncs nothing: for reading what a crash left."""

    name = "plain"
    direct = True
    refusal = ""

    def start(self, kind, file, offset_bytes, buffer):
        if kind == "read":
            assert os.preadv(file.fd, [buffer], offset_bytes) == len(buffer)
        elif kind == "write":
            assert os.pwritev(file.fd, [buffer], offset_bytes) == len(buffer)
        return lambda timeout_seconds: None

    def adopt(self, region):
        pass

    def tune(self, file, depth, io_bytes):
        pass

    def outstanding(self):
        return "nothing"

    def close(self):
        pass


class RecordingIO(PlainIO):
    """Keeps what the drives were told. `kill_at` raises `Killed` instead of starting so many operations later."""

    def __init__(self, base):
        """`base`: path to what is on the drive of a file before it is told anything."""
        self.base = {str(path): content for path, content in base.items()}
        self.operations = []
        self.now = 0
        self.kill_at = None

    def start(self, kind, file, offset_bytes, buffer):
        if kind == "read":
            return super().start(kind, file, offset_bytes, buffer)
        if self.kill_at is not None:
            if self.kill_at == 0:
                self.kill_at = None
                raise Killed
            self.kill_at -= 1
        super().start(kind, file, offset_bytes, buffer)
        operation = Operation(kind, file.path, offset_bytes, bytes(buffer), self.tick())
        self.operations.append(operation)

        def wait_for_it(timeout_seconds):
            if operation.waited is None:
                operation.waited = self.tick()

        return wait_for_it

    def finish(self):
        """What is under way arrives: nobody gets the lock of a killed process before that."""
        self.kill_at = None
        for operation in self.operations:
            if operation.waited is None:
                operation.waited = self.tick()

    def tick(self):
        self.now += 1
        return self.now

    def at(self, moment):
        """The crash at `moment`: (images with what is durable, optional writes in the order of their start)."""

        def happened(tick):
            return tick is not None and tick <= moment

        syncs = [o for o in self.operations if o.kind == "sync" and happened(o.waited)]
        images = {path: bytearray(content) for path, content in self.base.items()}
        optional = []
        for write in self.operations:
            if write.kind != "write" or not happened(write.started):
                continue
            covered = any(s.path == write.path and happened(write.waited) and write.waited < s.started for s in syncs)
            if covered:
                images[write.path][write.offset : write.offset + len(write.data)] = write.data
                # what came before and is not covered cannot come after it, if it was waited for before
                optional = [o for o in optional if not (overlap(o, write) and ordered(o, write))]
            else:
                optional.append(write)
        return images, optional


def overlap(one, other):
    return (
        one.path == other.path
        and one.offset < other.offset + len(other.data)
        and other.offset < one.offset + len(one.data)
    )


def ordered(one, other):
    return one.waited is not None and one.waited < other.started


def apply(images, write, sectors):
    """Lets the given sectors of a write arrive."""
    for sector in sectors:
        piece = write.data[sector * SECTOR : (sector + 1) * SECTOR]
        begin = write.offset + sector * SECTOR
        images[write.path][begin : begin + len(piece)] = piece


def num_sectors(write):
    return len(write.data) // SECTOR


def every_outcome(images, optional):
    """All combinations of: lost, whole, only the first half, only the second half. The writes must not race."""
    for one, other in itertools.combinations(optional, 2):
        assert not overlap(one, other) or ordered(one, other), "two writes to the same bytes race"
    choices = []
    for write in optional:
        count = num_sectors(write)
        choices.append([(), range(count), range(count // 2), range(count // 2, count)])
    for sectors in itertools.product(*choices):
        outcome = {path: bytearray(image) for path, image in images.items()}
        for write, arrived in zip(optional, sectors, strict=True):
            apply(outcome, write, arrived)
        yield outcome


def random_outcome(images, optional, random):
    """Any legal order, any sectors."""
    left, outcome = list(optional), {path: bytearray(image) for path, image in images.items()}
    while left:
        ready = [w for w in left if not any(overlap(o, w) and ordered(o, w) for o in left if o is not w)]
        write = random.choice(ready)
        left.remove(write)
        count = num_sectors(write)
        arrived = random.choice(["none", "all", "some"])
        apply(
            outcome,
            write,
            {"none": (), "all": range(count), "some": random.sample(range(count), random.randrange(count))}[arrived],
        )
    return outcome
