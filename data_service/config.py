"""Configuration of `data`: sources, tokenizer, rows, split and the service that streams them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from data_service.settings import Section

__all__ = [
    "DataConfig",
    "DataServiceConfig",
    "RejectsConfig",
    "SourceConfig",
    "SourceFormat",
    "SplitConfig",
    "TokenizerConfig",
    "TokenizerTrainConfig",
]

SourceFormat = Literal["csv", "jsonl", "parquet", "txt"]

_FORMAT_BY_SUFFIX: dict[str, SourceFormat] = {
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "txt",
}


class SourceConfig(Section):
    """One file (or glob) of records."""

    path: str
    """File, glob or `s3://` URI. Relative paths resolve against the YAML file."""
    format: SourceFormat | Literal["auto"] = "auto"
    """How to read it; `auto` goes by the suffix (.csv .jsonl .parquet .txt)."""
    text: str = "text"
    """The column (CSV, Parquet) or key (JSONL) that holds the text. Plain text has one record per line."""
    label: str | None = None
    """A column that CSV and Parquet files must have. It is looked for and not stored: a dataset holds text alone."""

    @model_validator(mode="after")
    def _format_is_known(self) -> Self:
        self.resolved_format  # noqa: B018  (raises when the suffix is unknown)
        return self

    @property
    def resolved_format(self) -> SourceFormat:
        """The concrete format, from `format` or the suffix of `path`."""
        if self.format != "auto":
            return self.format
        for suffix, found in _FORMAT_BY_SUFFIX.items():
            if self.path.lower().endswith(suffix):
                return found
        raise ValueError(
            f"path={self.path!r} has no suffix that tells its format. Set format to csv, jsonl, parquet or txt."
        )


class TokenizerTrainConfig(Section):
    """Train a byte-level BPE on the training part of the corpus."""

    vocab_size: int = Field(8000, ge=300, le=1_000_000)
    """Entries of the vocabulary, the 256 bytes and the special tokens included."""
    min_frequency: int = Field(2, ge=1)
    """A pair must occur this often to be merged."""


class TokenizerConfig(Section):
    """Where token ids come from: `train` on the corpus, or `path` of an existing tokenizer."""

    train: TokenizerTrainConfig | None = None
    """Train on the corpus."""
    path: str | None = None
    """A `tokenizer.json`, or a folder that holds one."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.train is not None and self.path is not None:
            raise ValueError("train and path are both set: a tokenizer is trained or read, not both. Remove one.")
        return self

    @property
    def to_train(self) -> TokenizerTrainConfig | None:
        """The training settings (the defaults where neither key is set); None when `path` is read instead."""
        return None if self.path is not None else (self.train or TokenizerTrainConfig())


class SplitConfig(Section):
    """How documents are divided between training and evaluation."""

    eval: float = Field(0.05, ge=0.0, lt=1.0)
    """Share of the documents held out for evaluation, chosen by a hash of the text."""
    deduplicate: bool = True
    """Drop exact repeats of a text before the split, so that none is on both sides."""


class RejectsConfig(Section):
    """How many bad records a preparation tolerates before it stops."""

    max_fraction: float = Field(0.1, ge=0.0, le=1.0)
    """Stop when more than this share of all records was rejected."""
    max_record_bytes: int = Field(16 * 2**20, gt=0)
    """A record longer than this is rejected."""


class DataServiceConfig(Section):
    """The service that streams batches to the ranks."""

    workers: int = Field(2, ge=1, le=1024)
    """Data workers, spread over the nodes."""
    run_ahead: int = Field(4, ge=1, le=1024)
    """Global batches that a rank may hold before it has consumed them."""
    read_stall_s: float = Field(3.0, gt=0)
    """A stream without progress for this long is cancelled and taken up at another worker."""
    stalled_s: float = Field(60.0, gt=0)
    """A rank that got no batch from any worker for this long fails with DataStalledError."""
    cache_bytes: int = Field(1 << 30, gt=0)
    """Most bytes of shards a data worker keeps in memory."""
    audit: bool = True
    """The controller reads the rows of every step from the shards itself and compares their hash with the ranks'."""


class DataConfig(Section):
    """What is trained on."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """The files, in order."""
    dataset: str | None = None
    """Folder or URI of the prepared dataset; by default `dataset/` in the run's folder."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Where token ids come from."""
    seq_len: int = Field(256, ge=2, le=1_000_000)
    """Tokens a row feeds to the model; a row holds one more, as the last label."""
    split: SplitConfig = SplitConfig()
    """The evaluation split."""
    rejects: RejectsConfig = RejectsConfig()
    """Tolerance for bad records."""
    shard_tokens: int = Field(4 * 2**20, ge=1024)
    """Tokens in a shard file; only the last of a split is shorter."""
    shuffle_window_shards: int = Field(16, ge=1)
    """Rows are shuffled inside windows of this many shards."""
    service: DataServiceConfig = DataServiceConfig()
    """The streaming service."""
