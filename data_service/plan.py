"""The plan of a split: all that the order of rows depends on, and nothing else.

Owns `Plan`, its JSON form and digest. A plan is a few hundred bytes at any scale; it travels in every ticket, so that
data workers keep no state. Refuses to know files, ranks or workers.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Literal

from data_service.errors import ConfigError, CursorMismatchError
from data_service.shards import DatasetManifest, SplitInfo

__all__ = ["PLAN_VERSION", "Plan", "Split", "make_plan", "num_rows_of", "rows_per_shard_of"]

Split = Literal["train", "eval"]

PLAN_VERSION = 1
"""Changes whenever the same fields would mean another order."""


def num_rows_of(num_tokens: int, seq_len: int) -> int:
    """Rows of a token stream: windows of seq_len + 1 tokens, seq_len apart, each with at least one label.

    Row r covers tokens [r·seq_len, r·seq_len + seq_len]; neighbours share one token, so that every token but the first
    is a label exactly once.
    """
    return max(0, -(-(num_tokens - 1) // seq_len))


def rows_per_shard_of(info: SplitInfo, seq_len: int) -> int:
    """Rows of a block: as many as fit in a shard."""
    return max(1, info.shard_tokens // seq_len)


@dataclass(frozen=True)
class Plan:
    """A split, cut into rows and put in order."""

    version: int
    dataset_digest: str
    split: Split
    seed: int
    seq_len: int
    """Tokens that a row feeds to the model; a row holds one more."""
    global_batch: int
    """Rows per optimizer step, on every mesh."""
    num_tokens: int
    """Tokens of the split."""
    num_rows: int
    """Rows of one epoch."""
    rows_per_shard: int
    """Rows of a block; blocks are permuted as wholes, each lies in one shard or two neighbours."""
    window_shards: int
    """Blocks whose rows are shuffled together."""
    shuffle: bool
    """Whether rows are permuted and epochs repeat without end (train), or come once in file order (eval)."""

    def __post_init__(self) -> None:
        """Check what a ticket from the network could get wrong."""
        counts = {
            "seq_len": self.seq_len,
            "global_batch": self.global_batch,
            "num_rows": self.num_rows,
            "rows_per_shard": self.rows_per_shard,
            "window_shards": self.window_shards,
        }
        for name, value in counts.items():
            if not 1 <= value < 2**62:
                raise ValueError(f"plan.{name}={value} is out of range.")
        if self.version != PLAN_VERSION:
            raise CursorMismatchError(
                f"a plan of version {self.version} was asked for, this is version {PLAN_VERSION}: the order of rows "
                "would differ. Use the release that started the run."
            )
        if self.split not in ("train", "eval"):
            raise ValueError(f"plan.split={self.split!r} is neither train nor eval.")
        if self.num_rows != num_rows_of(self.num_tokens, self.seq_len):
            raise ValueError(
                f"plan.num_rows={self.num_rows} does not follow from {self.num_tokens} tokens, {self.seq_len} a row."
            )

    @property
    def num_batches(self) -> int:
        """Global batches of one pass. An eval plan ends there, its last batch short; a train plan goes on for ever."""
        return -(-self.num_rows // self.global_batch)

    @cached_property
    def digest(self) -> str:
        """BLAKE2b-128 of the canonical JSON, as hexadecimal digits."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan, checking keys, types and bounds.

        Raises:
            ValueError: when it is not a plan.
            CursorMismatchError: when it is one of another version.
        """
        return cls.from_object(json.loads(text))

    @classmethod
    def from_object(cls, value: object) -> "Plan":
        """`from_json` of a value that is parsed already."""
        if not isinstance(value, dict) or set(value) != {field.name for field in fields(cls)}:
            raise ValueError("this is not a plan: its keys differ.")
        kinds: dict[str, type] = {field.name: int for field in fields(cls)}
        kinds.update(dataset_digest=str, split=str, shuffle=bool)
        for name, kind in kinds.items():
            if type(value[name]) is not kind:
                raise ValueError(f"plan.{name} is {type(value[name]).__name__}, not {kind.__name__}.")
        return cls(**value)


def make_plan(
    manifest: DatasetManifest, split: Split, seed: int, seq_len: int, global_batch: int, window_shards: int
) -> Plan:
    """The plan of a split of a prepared dataset.

    Raises:
        ConfigError: when the split holds no row.
    """
    info = manifest.splits[split]
    num_rows = num_rows_of(info.num_tokens, seq_len)
    if num_rows == 0:
        raise ConfigError(
            f"the {split} split was asked for, it holds no documents. "
            + ("Set data.split.eval above 0 and prepare again." if split == "eval" else "Add text to data.sources.")
        )
    return Plan(
        version=PLAN_VERSION,
        dataset_digest=manifest.digest,
        split=split,
        seed=seed,
        seq_len=seq_len,
        global_batch=global_batch,
        num_tokens=info.num_tokens,
        num_rows=num_rows,
        rows_per_shard=rows_per_shard_of(info, seq_len),
        window_shards=window_shards,
        shuffle=split == "train",
    )
