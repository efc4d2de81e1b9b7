"""Flat ranges of parameters and optimizer state, and how they intersect.

A parameter is seen as its flat, row-major vector of fp32; a checkpoint holds, for every canonical name and kind, ranges
that cover that vector exactly once. Which rank holds which range is no concern of this module, which is pure and loads
no torch; the readers that take fragments out of an engine are in `trainer.fragment_readers`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BYTES_PER_ELEMENT", "KINDS", "Fragment", "Kind", "Range", "coverage_problems", "intersect", "merge"]

Kind = Literal["master", "exp_avg", "exp_avg_sq", "momentum_buffer"]
KINDS: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq")
"""What Adam and AdamW keep of a parameter: the fp32 master and both moments. Of SGD see `trainer.optim.state_kinds`."""

BYTES_PER_ELEMENT = 4
"""Fragments are fp32."""


@dataclass(frozen=True, order=True)
class Range:
    """Elements [start, start + numel) of one parameter's flat vector, of one kind."""

    name: str
    kind: Kind
    start: int
    numel: int

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.numel


@dataclass(frozen=True, eq=False)
class Fragment:
    """A range with its values."""

    name: str
    kind: Kind
    start: int
    numel: int
    data: "Tensor"
    """1-D fp32 of `numel` elements."""

    @property
    def range(self) -> Range:
        """Where the values belong."""
        return Range(self.name, self.kind, self.start, self.numel)


def intersect(one: Range, other: Range) -> Range | None:
    """The elements that both ranges hold; None where there are none."""
    if (one.name, one.kind) != (other.name, other.kind):
        return None
    start, stop = max(one.start, other.start), min(one.stop, other.stop)
    return Range(one.name, one.kind, start, stop - start) if start < stop else None


def merge(ranges: Iterable[Range]) -> Iterator[Range]:
    """The same elements as fewest ranges, sorted; overlapping and adjacent ranges become one."""
    current: Range | None = None
    for found in sorted(ranges):
        if current is not None and (found.name, found.kind) == (current.name, current.kind):
            if found.start <= current.stop:
                stop = max(current.stop, found.stop)
                current = Range(current.name, current.kind, current.start, stop - current.start)
                continue
        if current is not None:
            yield current
        current = found
    if current is not None:
        yield current


def coverage_problems(ranges: Iterable[Range], numels: Mapping[str, int], kinds: Iterable[Kind]) -> list[str]:
    """What keeps ranges from covering every parameter exactly once.

    Args:
        ranges: all ranges of a checkpoint.
        numels: canonical name to number of elements.
        kinds: kinds that each parameter must have.

    Returns:
        One sentence for each gap, overlap, unknown name or kind and range beyond the end; empty when all is well.
    """
    wanted = {(name, kind): numel for name, numel in numels.items() for kind in kinds}
    reached = dict.fromkeys(wanted, 0)
    problems: list[str] = []
    for found in sorted(ranges):
        key = (found.name, found.kind)
        if key not in wanted:
            problems.append(f"{found.kind} of {found.name} belongs to no parameter")
        elif found.numel < 1:
            problems.append(f"{found.kind} of {found.name} has an empty range at {found.start}")
        elif found.start != reached[key]:
            word = "are missing" if found.start > reached[key] else "are there twice"
            low, high = sorted((found.start, reached[key]))
            problems.append(f"{found.kind} of {found.name}: elements {low} to {high} {word}")
            reached[key] = max(reached[key], found.stop)
        else:
            reached[key] = found.stop
    for (name, kind), numel in wanted.items():
        if reached[name, kind] != numel:
            word = "are missing" if reached[name, kind] < numel else "are beyond its end"
            low, high = sorted((reached[name, kind], numel))
            problems.append(f"{kind} of {name}: elements {low} to {high} {word}")
    return problems
