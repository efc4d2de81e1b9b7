"""The mesh of ranks and the share of a global batch that each of them takes.

Owns rank <-> (dp index, pipeline stage) and slots of a global batch <-> (dp index, micro-batch). Pure arithmetic;
knows nothing of nodes, processes or tensors.
"""

from dataclasses import dataclass
from typing import Literal

from data_service.errors import ConfigError

__all__ = ["AUTO_MICRO_BATCH_ROWS", "BatchLayout", "Mesh"]

AUTO_MICRO_BATCH_ROWS = 8
"""Most rows that `micro_batch: auto` puts into one forward pass."""


@dataclass(frozen=True)
class Mesh:
    """dp · pp ranks; consecutive ranks form one pipeline, so that a node holds whole pipelines."""

    dp: int
    pp: int

    def __post_init__(self) -> None:
        """Check the degrees."""
        if self.dp < 1 or self.pp < 1:
            raise ConfigError(f"train.parallel dp={self.dp}, pp={self.pp}: a degree is at least 1. Raise it.")

    @property
    def world_size(self) -> int:
        """Ranks of the mesh."""
        return self.dp * self.pp

    @property
    def reporter(self) -> int:
        """The rank that reports steps: the last stage of dp index 0, where the loss is."""
        return self.pp - 1

    def rank(self, dp_index: int, stage: int) -> int:
        """The rank at a coordinate."""
        assert 0 <= dp_index < self.dp, dp_index
        assert 0 <= stage < self.pp, stage
        return dp_index * self.pp + stage

    def coordinate(self, rank: int) -> tuple[int, int]:
        """(dp index, stage) of a rank."""
        assert 0 <= rank < self.world_size, rank
        return divmod(rank, self.pp)

    def pipeline(self, dp_index: int) -> tuple[int, ...]:
        """The ranks of one pipeline, first stage first."""
        return tuple(self.rank(dp_index, stage) for stage in range(self.pp))

    def stage_ranks(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold the same stage, in the order of their dp index."""
        return tuple(self.rank(dp_index, stage) for dp_index in range(self.dp))


@dataclass(frozen=True, init=False)
class BatchLayout:
    """How the rows of one global batch are laid over a mesh.

    Rows sit in slots 0 … dp · slots_per_rank - 1; a dp index takes a contiguous range of them, cut into micro-batches
    of equal size. Slots from `global_batch` on are masked rows.
    """

    global_batch: int
    dp: int
    pp: int
    micro_batch: int
    """Rows of a forward pass."""

    def __init__(self, global_batch: int, dp: int, pp: int, micro_batch: int | Literal["auto"] = "auto") -> None:
        """Lay a batch over a mesh.

        Args:
            global_batch: rows of an optimizer step.
            dp: data-parallel degree.
            pp: pipeline stages.
            micro_batch: rows of a forward pass; `auto` takes at most 8, and with a pipeline at least 2 · pp
                micro-batches where the rows allow it, so that the bubble (pp - 1) / (gas + pp - 1) stays below a third
                (Narayanan et al. 2019).

        Raises:
            ConfigError: a count is below 1.
        """
        if global_batch < 1:
            raise ConfigError(f"train.global_batch={global_batch}: a batch has at least 1 row. Raise it.")
        if micro_batch != "auto" and micro_batch < 1:
            raise ConfigError(f"train.micro_batch={micro_batch}: set a positive number or auto.")
        Mesh(dp, pp)
        rows = -(-global_batch // dp)
        object.__setattr__(self, "global_batch", global_batch)
        object.__setattr__(self, "dp", dp)
        object.__setattr__(self, "pp", pp)
        object.__setattr__(
            self, "micro_batch", _auto_rows(rows, pp) if micro_batch == "auto" else min(micro_batch, rows)
        )

    @property
    def rows_per_rank(self) -> int:
        """Rows that the fullest dp index must take."""
        return -(-self.global_batch // self.dp)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a rank in one step: DeepSpeed's gradient accumulation steps (gas)."""
        return -(-self.rows_per_rank // self.micro_batch)

    @property
    def slots_per_rank(self) -> int:
        """Slots of one dp index."""
        return self.micro_batch * self.num_micro_batches

    @property
    def num_slots(self) -> int:
        """Slots of all dp indices; at least `global_batch`."""
        return self.dp * self.slots_per_rank

    def slots(self, dp_index: int) -> tuple[int, int]:
        """[first, last) slots of a dp index."""
        assert 0 <= dp_index < self.dp, dp_index
        return dp_index * self.slots_per_rank, (dp_index + 1) * self.slots_per_rank

    def micro_slots(self, dp_index: int, index: int) -> tuple[int, int]:
        """[first, last) slots of one micro-batch of a dp index."""
        assert 0 <= index < self.num_micro_batches, index
        first = self.slots(dp_index)[0] + index * self.micro_batch
        return first, first + self.micro_batch

    def weight(self, num_tokens: int) -> float:
        """Weight w = dp · gas / N of every token loss of a step with N valid tokens.

        The engine divides a micro-batch's loss by gas and averages gradients over dp, so that w · Σ of the token losses
        gives the mean over all valid tokens of the global batch.
        """
        assert num_tokens > 0, num_tokens
        return self.dp * self.num_micro_batches / num_tokens


def _auto_rows(rows: int, pp: int) -> int:
    """Rows of a micro-batch for a rank of `rows`: in the upper half of what fits, with the fewest masked rows."""
    wanted_micro_batches = 2 * pp if pp > 1 else 1
    most = min(AUTO_MICRO_BATCH_ROWS, max(1, rows // wanted_micro_batches))
    return min(range(most, most // 2, -1), key=lambda micro: -(-rows // micro) * micro)
