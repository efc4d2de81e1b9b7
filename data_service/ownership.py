"""Which of a service's workers reads a shard: rendezvous hashing over the members of a cluster.

Every shard goes to the member whose keyed score with it is highest (Thaler and Ravishankar, "Using Name-Based Mappings
to Increase Hit Rates", IEEE/ACM Trans. Netw. 6, 1998). So each shard is read by one worker, everyone finds the same one
without asking, and when a member leaves only its shards move.

Owns the scores. Refuses to know who is alive, and what a worker does with a shard.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from data_service.order import shards_of
from data_service.plan import Plan

__all__ = ["fallbacks", "owners", "owners_of_rows"]

_U64 = npt.NDArray[np.uint64]
_C1, _C2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_MAX_TABLE = 1 << 22
"""Most shards whose owners are kept in a table."""


def _mix(values: _U64) -> _U64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _C1
    values = (values ^ (values >> np.uint64(27))) * _C2
    return values ^ (values >> np.uint64(31))


def _key(*parts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=64)
def _part_keys(plan: Plan) -> _U64:
    """For uint64 [parts]. The order that a run asks for does not matter: all runs over a dataset share its shards."""
    return np.array(
        [
            _key("stormjib.owner", plan.dataset_digest, plan.split, part.source, str(part.generation))
            for part in plan.parts
        ],
        dtype=np.uint64,
    )


@lru_cache(maxsize=256)
def _member_keys(members: tuple[str, ...]) -> _U64:
    return np.array([_key("stormjib.member", member) for member in members], dtype=np.uint64)


def owners(
    plan: Plan, members: Sequence[str], part: npt.NDArray[np.uint32], shard: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint32]:
    """The member that owns each shard.

    Args:
        plan: names the dataset, the split and its parts.
        members: distinct worker ids, sorted, so that an index means the same to everyone.
        part: [n], index in plan.parts.
        shard: [n], number of the shard in its part.

    Returns:
        uint32 [n], index in `members`; zeros where there are none.
    """
    if len(members) <= 1:
        return np.zeros(part.size, dtype=np.uint32)
    keys = _mix(_part_keys(plan)[part] + shard.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    best = np.zeros(part.size, dtype=np.uint32)
    highest = np.zeros(part.size, dtype=np.uint64)
    for number, member in enumerate(_member_keys(tuple(members))):
        score = _mix(keys ^ member)
        better = score > highest
        best[better] = number
        np.maximum(highest, score, out=highest)
    return best


def owners_of_rows(plan: Plan, members: Sequence[str], row_ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """The member that owns the shard of each row; uint32 [n]."""
    if len(members) <= 1:
        return np.zeros(row_ids.size, dtype=np.uint32)
    part, shard = shards_of(plan, row_ids)
    table, first_shard = _table(plan, tuple(members))
    if table is None:
        _, first, which = np.unique(
            part.astype(np.uint64) << np.uint64(32) | shard, return_index=True, return_inverse=True
        )
        found: npt.NDArray[np.uint32] = owners(plan, members, part[first], shard[first])[which]
        return found
    number = first_shard[part] + shard.astype(np.int64)
    found = table[number]
    unknown = np.flatnonzero(found == _UNKNOWN)
    if unknown.size:
        _, first = np.unique(number[unknown], return_index=True)
        first = unknown[first]
        table[number[first]] = owners(plan, members, part[first], shard[first])
        found = table[number]
    return found


_UNKNOWN = np.uint32(2**32 - 1)


@lru_cache(maxsize=8)
def _table(plan: Plan, members: tuple[str, ...]) -> tuple[npt.NDArray[np.uint32] | None, npt.NDArray[np.int64]]:
    """Owners of all shards of a plan, filled as they are asked for, and where each part's begin in it.

    Threads may fill it at the same time: they write the same.
    """
    counts = np.array([part.num_shards for part in plan.parts], dtype=np.int64)
    first = np.cumsum(counts) - counts
    total = int(counts.sum())
    return (np.full(total, _UNKNOWN, np.uint32) if total <= _MAX_TABLE else None), first


def fallbacks(members: Sequence[str], member: int) -> list[int]:
    """The other members in the order to ask them when `members[member]` does not answer; spread over all of them."""
    others = [number for number in range(len(members)) if number != member]
    return sorted(others, key=lambda number: _key("stormjib.fallback", members[member], members[number]), reverse=True)
