"""What a preparation counts of each source: records, rejects, duplicates, and documents by length; `stats.json`.

Lengths are counted in buckets: each length below 64 has its own, above it 32 share a doubling, so a quantile is known
to 3 % and the file stays small at any scale.

Owns the content of `stats.json`. Refuses to print.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from data_service import storage
from data_service.errors import ConfigError
from data_service.manifest import SPLITS

__all__ = [
    "NO_ANSWER",
    "SourceCounts",
    "SplitCounts",
    "counts_to_json",
    "length_counts",
    "merged_counts",
    "read_counts",
    "stats_file",
]

NO_ANSWER = "answer beyond data.seq_len"
"""Why a chat is left out whose row would hold no label that counts."""
_EXACT = 64
_PER_OCTAVE = 32


@dataclass(frozen=True)
class SplitCounts:
    """Documents of a source in a split, duplicates left out."""

    documents: int = 0
    tokens: int = 0
    """End tokens included; before a chat or a labelled text is cut to its row."""
    num_bytes: int = 0
    """Of text in UTF-8 (of a chat, of the JSON of its messages)."""
    lengths: Mapping[int, int] = field(default_factory=dict)
    """Least length in tokens of a bucket → documents in it; ascending, empty buckets left out."""

    def __add__(self, other: "SplitCounts") -> "SplitCounts":
        lengths = Counter(self.lengths)
        lengths.update(other.lengths)
        return SplitCounts(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.num_bytes + other.num_bytes,
            dict(sorted(lengths.items())),
        )


@dataclass(frozen=True)
class SourceCounts:
    """Everything counted of one source, over all generations up to one."""

    source: str
    num_files: int
    num_records: int
    num_duplicates: int
    num_truncated: int
    """Chats and labelled texts that lost their end."""
    reject_reasons: Mapping[str, int]
    splits: Mapping[str, SplitCounts]
    labels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Split → class → documents; empty where the dataset has no classes."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason → good documents that are in no row."""

    @property
    def num_rejects(self) -> int:
        """Records left out."""
        return sum(self.reject_reasons.values())

    def __add__(self, other: "SourceCounts") -> "SourceCounts":
        reasons = Counter(self.reject_reasons)
        reasons.update(other.reject_reasons)
        labels = {split: Counter(counts) for split, counts in self.labels.items()}
        for split, counts in other.labels.items():
            labels.setdefault(split, Counter()).update(counts)
        return SourceCounts(
            self.source,
            self.num_files + other.num_files,
            self.num_records + other.num_records,
            self.num_duplicates + other.num_duplicates,
            self.num_truncated + other.num_truncated,
            dict(sorted(reasons.items())),
            {split: self.splits[split] + other.splits[split] for split in SPLITS},
            {split: dict(sorted(counts.items())) for split, counts in labels.items()},
            dict(sorted((Counter(self.left_out) + Counter(other.left_out)).items())),
        )


def length_counts(lengths: npt.NDArray[np.uint32]) -> dict[int, int]:
    """Documents by bucket: least length → count."""
    if not lengths.size:
        return {}
    exact = lengths.astype(np.int64)
    octave = np.frexp(exact.astype(np.float64))[1] - 1
    shift = np.maximum(octave - _PER_OCTAVE.bit_length() + 1, 0)
    least = np.where(exact < _EXACT, exact, exact >> shift << shift)
    values, counts = np.unique(least, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def merged_counts(parts: Iterable[SourceCounts]) -> list[SourceCounts]:
    """Counts of the same source added up, sources in the order in which they first come."""
    total: dict[str, SourceCounts] = {}
    for part in parts:
        total[part.source] = total[part.source] + part if part.source in total else part
    return list(total.values())


def stats_file(generation: int) -> str:
    """Path of a generation's counts inside its dataset."""
    return "stats.json" if generation == 0 else f"stats.{generation:05d}.json"


def counts_to_json(counts: Sequence[SourceCounts]) -> str:
    """The content of `stats.json`."""
    return json.dumps({"sources": [asdict(one) for one in counts]}, ensure_ascii=False) + "\n"


def read_counts(dataset_uri: str, generation: int) -> list[SourceCounts]:
    """The counts of each source, of all generations up to one.

    Raises:
        ConfigError: when the file is gone or is not one of counts.
    """
    uri = storage.join(dataset_uri, stats_file(generation))
    try:
        return [_source_counts(value) for value in json.loads(storage.read_bytes(uri))["sources"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{uri} was asked for, it is gone or damaged ({type(error).__name__}: {error}). Prepare the dataset again, "
            "which restores it."
        ) from error


def _source_counts(value: dict[str, object]) -> SourceCounts:
    splits = {}
    for split in SPLITS:
        one = dict(value["splits"][split])  # type: ignore[index]
        one["lengths"] = {int(length): count for length, count in one["lengths"].items()}
        splits[split] = SplitCounts(**one)
    return SourceCounts(**{**value, "splits": splits})  # type: ignore[arg-type]
