"""Plans made by hand, and the order they mean computed the slow way: with counters and lists of whole epochs."""

import hashlib
import math
from collections.abc import Iterator, Sequence

from data_service.plan import PLAN_VERSION, Plan, PlanPart, Segment

__all__ = ["SlowOrder", "hand_made", "slow_counts", "slow_crc32c", "slow_permutation"]


def hand_made(
    parts: Sequence[tuple[str, int, int, int]],
    *,
    global_batch: int = 8,
    window: int = 3,
    segments: Sequence[tuple[int, Sequence[int]]] = (),
    skip: Sequence[tuple[int, int]] = (),
    split: str = "train",
    seq_len: int = 10,
    seed: int = 7,
    dataset: str = "d1",
) -> Plan:
    """A plan of stream rows.

    Args:
        parts: (source, generation, rows, rows per shard).
        segments: (first batch, weights); by default one with the sources' rows.
    """
    made = tuple(PlanPart(*part) for part in parts)
    names = dict.fromkeys(part.source for part in made)
    natural = tuple(sum(part.num_rows for part in made if part.source == name) for name in names)
    return Plan(
        version=PLAN_VERSION,
        dataset_digest=dataset,
        split=split,
        rows="stream",
        seed=seed,
        seq_len=seq_len,
        global_batch=global_batch,
        window_shards=window,
        shuffle=split == "train",
        isolate_documents=False,
        loss_masks=False,
        num_labels=0,
        parts=made,
        segments=tuple(Segment(first, tuple(weights)) for first, weights in segments) or (Segment(0, natural),),
        skip=tuple(skip),
    )


def slow_counts(weights: Sequence[int], samples: int) -> Iterator[tuple[int, int]]:
    """(source, how many it gave before) of each sample in turn, with a counter at every node of the tree."""
    seen: dict[tuple[int, int], int] = {}
    for _ in range(samples):
        low, high = 0, len(weights)
        while high - low > 1:
            middle = (low + high) // 2
            left, both = sum(weights[low:middle]), sum(weights[low:high])
            count = seen.get((low, high), 0)
            seen[low, high] = count + 1
            if (count + 1) * left // both > count * left // both:
                high = middle
            else:
                low = middle
        before = seen.get((low, high), 0)
        seen[low, high] = before + 1
        yield low, before


def _noise(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value >> 32


def slow_permutation(size: int, keys: Sequence[int]) -> list[int]:
    """The whole keyed permutation of range(size), in Python's integers."""
    root = max(1, math.isqrt(size))
    pairs = [(a, -(-size // a)) for a in range(root, root + 16)]
    a, b = min(pairs, key=lambda pair: pair[0] * pair[1])
    found = []
    for value in range(size):
        while True:
            left, right = divmod(value, b)
            for number in range(0, 8, 2):
                left = (left + (_noise((right + keys[number]) % 2**64) * a >> 32)) % a
                right = (right + (_noise((left + keys[number + 1]) % 2**64) * b >> 32)) % b
            value = left * b + right
            if value < size:
                break
        found.append(value)
    return found


def _crc32c_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC32C = [_crc32c_of_byte(byte) for byte in range(256)]


def slow_crc32c(data: bytes) -> int:
    """CRC-32C, byte by byte."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


class SlowOrder:
    """Rows of a plan one after the other, epochs as lists."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def _keys(self, part: PlanPart, purpose: str, *numbers: int) -> list[int]:
        plan = self.plan
        words = ["stormjib.order", plan.version, plan.dataset_digest, plan.split, plan.seed]
        words += [part.source, part.generation, purpose, *numbers]
        digest = hashlib.blake2b("\0".join(map(str, words)).encode()).digest()
        return [int.from_bytes(digest[at : at + 8], "little") for at in range(0, 64, 8)]

    def epoch(self, part: PlanPart, number: int) -> list[int]:
        """The rows of a part in the order of one epoch."""
        count, per_shard = part.num_shards, part.rows_per_shard
        others = slow_permutation(count - 1, self._keys(part, "shards", number))
        others.insert(self._keys(part, "last", number)[0] % count, count - 1)
        num_windows = -(-count // self.plan.window_shards)
        rows: list[int] = []
        for window in range(num_windows):
            low, high = window * count // num_windows, (window + 1) * count // num_windows
            inside = [
                row
                for shard in others[low:high]
                for row in range(shard * per_shard, min(part.num_rows, (shard + 1) * per_shard))
            ]
            places = slow_permutation(len(inside), self._keys(part, "rows", number, window))
            rows += [inside[place] for place in places]
        return rows

    def batches(self, count: int) -> list[list[int]]:
        """Row ids of the absolute batches 0 … count-1, as if none were skipped."""
        plan = self.plan
        row_streams = [self._rows_of(part) for part in plan.parts]
        part_streams = [self._parts_in_turn(indices) for _, indices in plan.sources]
        found: list[list[int]] = []
        bounds = [segment.first_batch for segment in plan.segments[1:]] + [count]
        for segment, end in zip(plan.segments, bounds, strict=True):
            for source, _ in slow_counts(segment.weights, max(0, min(end, count) - len(found)) * plan.global_batch):
                if not found or len(found[-1]) == plan.global_batch:
                    found.append([])
                part = next(part_streams[source])
                found[-1].append(part << 48 | next(row_streams[part]))
        return found

    def _parts_in_turn(self, indices: Sequence[int]) -> Iterator[int]:
        sizes = [self.plan.parts[index].num_rows for index in indices]
        for which, _ in slow_counts(sizes, 10**9):
            yield indices[which]

    def _rows_of(self, part: PlanPart) -> Iterator[int]:
        epoch = 0
        while True:
            yield from self.epoch(part, epoch)
            epoch += 1
