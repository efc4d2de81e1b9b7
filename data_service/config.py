"""Configuration of `data`: sources, tokenizer, rows, split and the service that streams them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from data_service.settings import Section

__all__ = [
    "DataConfig",
    "DataServiceConfig",
    "MixtureConfig",
    "RejectsConfig",
    "RowKind",
    "SkipConfig",
    "SourceConfig",
    "SourceFormat",
    "SplitConfig",
    "TokenizerConfig",
    "TokenizerTrainConfig",
    "WeightChange",
    "default_source_name",
]

SourceFormat = Literal["csv", "tsv", "jsonl", "parquet", "arrow", "txt"]
Compression = Literal["none", "gzip", "zstd"]
RowKind = Literal["stream", "document", "packed"]

FORMAT_BY_SUFFIX: dict[str, SourceFormat] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "txt",
}
COMPRESSION_BY_SUFFIX: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


class SourceConfig(Section):
    """One source: a file, a folder or a glob of records of one format."""

    name: str | None = Field(None, min_length=1, max_length=64)
    """Name in mixtures, statistics and messages; by default the path's last part without its suffixes."""
    path: str
    """File, folder, glob or `s3://` URI. Relative paths resolve against the YAML file."""
    format: SourceFormat | Literal["auto"] = "auto"
    """How to read it; `auto` goes by the suffix, one in front of .gz or .zst included; in a folder by each file's."""
    compression: Compression | Literal["auto"] = "auto"
    """`auto` goes by the suffix .gz or .zst."""
    text: str = "text"
    """The column (CSV, TSV, Parquet, Arrow) or key (JSONL) of the text. Plain text has one record per line."""
    messages: str | None = None
    """The column or key of a chat, a list of {role, content}, taken instead of `text`. Its loss is on the assistant's
    words alone. Needs data.rows document or packed and a tokenizer with a chat template."""
    label: str | None = None
    """The column or key of a class. Delivered with data.rows=document; elsewhere it is looked for and not stored."""
    weight: float | None = Field(None, gt=0, lt=1e9, allow_inf_nan=False)
    """Share of this source in the mixture, relative to the other sources' weights. Set on all sources or on none; by
    default a source's share is its rows, so that every row comes once in an epoch."""


class TokenizerTrainConfig(Section):
    """Train a tokenizer on the training part of the corpus."""

    model: Literal["bpe", "unigram"] = "bpe"
    """Byte-level BPE, or a byte-level unigram model."""
    vocab_size: int = Field(8000, ge=300, le=1_000_000)
    """Entries of the vocabulary, the 256 bytes and the special tokens included."""
    min_frequency: int = Field(2, ge=1)
    """A pair must occur this often to be merged (bpe)."""
    max_bytes: int = Field(256 * 2**20, ge=1 << 20)
    """Most bytes of text to train on: documents are chosen by the hash of their text, evenly over the corpus."""


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


class WeightChange(Section):
    """From a global batch on, other weights."""

    first_batch: int = Field(ge=1, lt=2**40)
    """The first global batch drawn with these weights. Batches count from 0: step s consumes batch s - 1, as long as
    nothing before it is skipped."""
    weights: dict[str, float]
    """Source name to weight, for every source; 0 pauses one."""


class MixtureConfig(Section):
    """How sources are mixed."""

    temperature: float = Field(1.0, ge=0.01, le=1e6)
    """Shares are proportional to weight ** (1 / temperature); above 1 small sources come more often."""
    changes: tuple[WeightChange, ...] = Field((), max_length=256)
    """Changes of the weights, in the order of their batches. A source goes on where it stood: nothing is lost or
    repeated. A run in progress accepts new changes behind the batches that it has consumed."""


class SkipConfig(Section):
    """Global batches that are never consumed, such as those around a loss spike."""

    first: int = Field(ge=0, lt=2**40)
    """The first batch left out. Batches are numbered absolutely: leaving one out renumbers no other."""
    end: int = Field(ge=1, lt=2**40)
    """The batch behind the last one left out."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.end <= self.first:
            raise ValueError(f"first={self.first} with end={self.end}: end is the batch behind the last. Raise end.")
        return self


class DataServiceConfig(Section):
    """The service that streams batches to the ranks."""

    address: tuple[str, ...] = ()
    """`host:port` of control planes of a service that runs already (`python -m data_service control`); empty starts
    one for the run. Its token comes from the environment variable STORMJIB_DATA_TOKEN."""
    workers: int = Field(2, ge=1, le=256)
    """Data workers, spread over the nodes."""
    run_ahead: int = Field(4, ge=1, le=1024)
    """Global batches that a rank may hold before it has consumed them."""
    hedge_s: float = Field(0.3, gt=0)
    """A read whose worker gives no sign of life for this long is asked of a second one too, for what that has at hand;
    after twice this the second one may load the shards. The first answer counts."""
    read_stall_s: float = Field(3.0, gt=0)
    """A read without an answer for this long, while no bytes come from the store for its shards either, is given up and
    its worker avoided."""
    stalled_s: float = Field(60.0, gt=0)
    """A rank that got no batch from any worker for this long fails with DataStalledError."""
    cache_dir: str | None = None
    """Folder on each worker's machine for shards of a remote dataset; by default below the temporary folder. A dataset
    on a file system is read in place."""
    cache_bytes: int = Field(8 << 30, gt=0)
    """Most bytes of shards that a data worker keeps on its disk."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Port of Prometheus metrics, behind the service's token, on the control plane and each worker; 0 takes a free one,
    None serves none."""
    audit: bool = True
    """The controller reads the rows of every step from the shards itself and compares their hash with the ranks'."""

    @model_validator(mode="after")
    def _deadlines_ascend(self) -> Self:
        if not self.hedge_s < self.read_stall_s < self.stalled_s:
            raise ValueError(
                f"hedge_s={self.hedge_s:g}, read_stall_s={self.read_stall_s:g}, stalled_s={self.stalled_s:g}: a second "
                "worker is asked before a read is cancelled, and that before a rank gives up. Put them in this order."
            )
        for address in self.address:
            host, _, port = address.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"address {address!r} is not host:port. Name a control plane such as 10.0.0.5:7000.")
        return self


class DataConfig(Section):
    """What is trained on."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1, max_length=1024)
    """The sources, in order."""
    dataset: str | None = None
    """Folder or URI of the prepared dataset; by default `dataset/` in the run's folder."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Where token ids come from."""
    chat_template: str | None = None
    """A Jinja file that turns messages into text; by default the tokenizer's own."""
    rows: RowKind = "stream"
    """`stream`: windows over the concatenated documents. `document`: one document a row, padded; longer text is cut
    into several rows, longer chats and labelled texts lose their end. `packed`: whole documents packed into rows."""
    seq_len: int = Field(256, ge=2, le=1_000_000)
    """Tokens a row feeds to the model; a row holds one more, as the last label."""
    isolate_documents: bool = False
    """Attention and positions begin anew at each document, and no loss is taken on predicting a document's start."""
    mixture: MixtureConfig = MixtureConfig()
    """How sources are mixed."""
    skip: tuple[SkipConfig, ...] = Field((), max_length=256)
    """Ranges of global batches that are never consumed."""
    split: SplitConfig = SplitConfig()
    """The evaluation split."""
    rejects: RejectsConfig = RejectsConfig()
    """Tolerance for bad records."""
    shard_tokens: int = Field(4 * 2**20, ge=1024, le=2**30)
    """Tokens in a shard file; only the last of a source's preparation is shorter."""
    shuffle_window_shards: int = Field(16, ge=1, lt=2**20)
    """Rows are shuffled inside windows of this many shards."""
    service: DataServiceConfig = DataServiceConfig()
    """The streaming service."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """One name per source, in order."""
        return tuple(source.name or default_source_name(source.path) for source in self.sources)

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        names = self.source_names
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(
                    f"sources.{number} and sources.{names.index(name)} are both named {name!r}. Give each a name."
                )
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"sources.{weighted.index(True)}.weight is set and sources.{weighted.index(False)}.weight is not. "
                "Set it on all sources or on none."
            )
        batches = [change.first_batch for change in self.mixture.changes]
        if batches != sorted(set(batches)):
            raise ValueError(f"mixture.changes begin at batches {batches}: put them in order, each batch once.")
        for number, change in enumerate(self.mixture.changes):
            if set(change.weights) != set(names):
                raise ValueError(
                    f"mixture.changes.{number}.weights names {', '.join(sorted(change.weights)) or 'nothing'}, the "
                    f"sources are {', '.join(names)}. Name each of them."
                )
            if not all(0 <= weight < 1e9 for weight in change.weights.values()) or not any(change.weights.values()):
                raise ValueError(f"mixture.changes.{number}.weights: each is 0 or more, below 1e9, and one above 0.")
        for before, after in zip(self.skip, self.skip[1:], strict=False):
            if after.first < before.end:
                raise ValueError(
                    f"skip: the range from {after.first} begins before the one to {before.end} ends. Put them in order "
                    "and join those that overlap."
                )
        for number, source in enumerate(self.sources):
            if source.messages is not None and self.rows == "stream":
                raise ValueError(
                    f"sources.{number}.messages with rows=stream: a chat is kept whole. Set data.rows to document or "
                    "packed."
                )
            if source.messages is not None and self.chat_template is None and self.tokenizer.path is None:
                raise ValueError(
                    f"sources.{number}.messages with a tokenizer that is trained: it has no chat template. Set "
                    "data.chat_template to a Jinja file, or data.tokenizer.path to a tokenizer that has one."
                )
        return self


def default_source_name(path: str) -> str:
    """The last part of a path that holds more than wildcards, without suffixes.

    `s3://b/zh-*.jsonl.gz` is `zh`, `corpora/en/*.txt` is `en`.
    """
    for part in reversed(path.partition("://")[2].split("/") if "://" in path else path.split("/")):
        if stem := part.partition(".")[0].strip("*?-_ "):
            return stem
    return "source"
