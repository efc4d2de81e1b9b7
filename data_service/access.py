"""What a rank is given to reach its data: addresses, a token, the order it asks for and deadlines.

Owns `DataAccess` and its JSON form. Refuses to hold a dataset path: ranks read rows from the service only.
"""

import json
from dataclasses import asdict, dataclass, field, fields

from data_service.plan import OrderSpec

__all__ = ["DataAccess"]


@dataclass(frozen=True)
class DataAccess:
    """Everything a rank knows about its data."""

    control: tuple[str, ...]
    """`host:port` of the control planes, tried in order."""
    token: str = field(repr=False)
    """Bearer token for the control and the data plane."""
    order: OrderSpec
    """What the control plane makes plans of."""
    dataset_digest: str
    """The generation of the dataset that the run reads."""
    run_ahead: int = 4
    """Global batches that a stream may hold before they are consumed."""
    hedge_s: float = 0.3
    """A read whose worker is silent for this long is asked of a second one, which loads no shards before twice this."""
    read_stall_s: float = 3.0
    """A read without an answer, or bytes from the store, for this long is given up and its worker avoided."""
    stalled_s: float = 60.0
    """No batch from any worker for this long is a DataStalledError."""

    def __post_init__(self) -> None:
        """Check the bounds, so that a bad spec fails where it is made and not in a rank."""
        if not self.control:
            raise ValueError("DataAccess.control is empty: at least one address of a control plane is needed.")
        if self.run_ahead < 1 or min(self.hedge_s, self.read_stall_s, self.stalled_s) <= 0:
            raise ValueError(
                f"DataAccess(run_ahead={self.run_ahead}, hedge_s={self.hedge_s}, read_stall_s={self.read_stall_s}, "
                f"stalled_s={self.stalled_s}): all four must be positive."
            )

    def to_json(self) -> str:
        """One JSON object; it holds the token, so treat it as a secret."""
        return json.dumps({**asdict(self), "order": self.order.to_json()})

    @classmethod
    def from_json(cls, text: str) -> "DataAccess":
        """The inverse of `to_json`."""
        value = json.loads(text)
        value |= {"order": OrderSpec.from_json(value["order"]), "control": tuple(value["control"])}
        return cls(**{one.name: value[one.name] for one in fields(cls)})
