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

from data_service.order import mix, shards_of
from data_service.plan import Plan

__all__ = ["fallbacks", "owners", "owners_of_rows"]

_U64 = npt.NDArray[np.uint64]


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
    keys = mix(_part_keys(plan)[part] + shard.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    best = np.zeros(part.size, dtype=np.uint32)
    highest = np.zeros(part.size, dtype=np.uint64)
    for number, member in enumerate(_member_keys(tuple(members))):
        score = mix(keys ^ member)
        better = score > highest
        best[better] = number
        np.maximum(highest, score, out=highest)
    return best


def owners_of_rows(plan: Plan, members: Sequence[str], row_ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """The member that owns the shard of each row; uint32 [n]."""
    if len(members) <= 1:
        return np.zeros(row_ids.size, dtype=np.uint32)
    part, shard = shards_of(plan, row_ids)
    _, first, which = np.unique(part.astype(np.uint64) << np.uint64(32) | shard, return_index=True, return_inverse=True)
    found: npt.NDArray[np.uint32] = owners(plan, members, part[first], shard[first])[which]
    return found


def fallbacks(members: Sequence[str], member: int) -> list[int]:
    """The other members in the order to ask them when `members[member]` does not answer; spread over all of them."""
    others = [number for number in range(len(members)) if number != member]
    return sorted(others, key=lambda number: _key("stormjib.fallback", members[member], members[number]), reverse=True)
