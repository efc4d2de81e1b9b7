"""What a rank knows about data: where the service is and how patient to be. No dataset path."""

import json
from dataclasses import asdict, dataclass

__all__ = ["DataAccess"]


@dataclass(frozen=True)
class DataAccess:
    """Addresses and limits of the data service, as a rank gets them."""

    control: tuple[str, ...]
    """`host:port` of the control plane; the first that answers is used."""
    token: str
    """Bearer token for both planes."""
    run_ahead: int
    """Global batches a client may hold that were not consumed yet."""
    read_stall_s: float
    """A stream without progress for this long is cancelled and taken up at another worker."""
    stalled_s: float
    """No batch from any worker for this long is a DataStalledError."""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "DataAccess":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, "control": tuple(fields["control"])})
