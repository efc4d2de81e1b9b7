"""What a rank is given to reach its data: addresses, a token and deadlines.

Owns `DataAccess` and its JSON form. Refuses to hold a dataset path: ranks read rows from the service only.
"""

import json
from dataclasses import asdict, dataclass, field

__all__ = ["DataAccess"]


@dataclass(frozen=True)
class DataAccess:
    """Everything a rank knows about its data."""

    control: tuple[str, ...]
    """`host:port` of the control planes, tried in order."""
    token: str = field(repr=False)
    """Bearer token for the control and the data plane."""
    run_ahead: int = 4
    """Global batches that a stream may hold before they are consumed."""
    read_stall_s: float = 3.0
    """A read without an answer for this long is given up and taken to another worker."""
    stalled_s: float = 60.0
    """No batch from any worker for this long is a DataStalledError."""

    def __post_init__(self) -> None:
        """Check the bounds, so that a bad spec fails where it is made and not in a rank."""
        if not self.control:
            raise ValueError("DataAccess.control is empty: at least one address of a control plane is needed.")
        if self.run_ahead < 1 or self.read_stall_s <= 0 or self.stalled_s <= 0:
            raise ValueError(
                f"DataAccess(run_ahead={self.run_ahead}, read_stall_s={self.read_stall_s}, "
                f"stalled_s={self.stalled_s}): all three must be positive."
            )

    def to_json(self) -> str:
        """One JSON object; it holds the token, so treat it as a secret."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "DataAccess":
        """The inverse of `to_json`."""
        value = json.loads(text)
        return cls(
            control=tuple(str(address) for address in value["control"]),
            token=str(value["token"]),
            run_ahead=int(value["run_ahead"]),
            read_stall_s=float(value["read_stall_s"]),
            stalled_s=float(value["stalled_s"]),
        )
