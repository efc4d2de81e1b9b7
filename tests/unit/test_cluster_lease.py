"""Leases under a clock of our own."""

import pytest

from cluster.lease import Lease


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_runs_out_unless_renewed() -> None:
    clock = Clock()
    lease = Lease(10.0, clock)
    assert lease.remaining_s() == 10.0
    clock.now += 9.5
    assert not lease.expired
    lease.renew()
    clock.now += 9.5
    assert lease.remaining_s() == pytest.approx(0.5)
    clock.now += 0.5
    assert lease.expired
    assert lease.remaining_s() == 0.0


def test_renewal_revives_it() -> None:
    clock = Clock()
    lease = Lease(1.0, clock)
    clock.now += 60.0
    assert lease.expired
    lease.renew()
    assert not lease.expired


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_lease_without_time_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        Lease(seconds)
