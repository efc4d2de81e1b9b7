"""The process group of an attempt: joining, deadlines, leaving.

Owns the store that the ranks meet at and the deadline of every collective. Knows nothing of models.
"""

import os
import socket
from datetime import timedelta
from typing import Literal

import deepspeed
import torch
from torch import distributed as dist
from torch.distributed import TCPStore, distributed_c10d  # type: ignore[attr-defined]  # no stub names TCPStore

from trainer.deepspeed_config import quiet, rank_environment, switch_off_builds
from trainer.errors import WorkerLostError

__all__ = ["bound_all_groups", "close_process_group", "open_process_group"]


def open_process_group(
    rank: int,
    world_size: int,
    local_rank: int,
    master: tuple[str, int],
    device: Literal["cpu", "cuda"],
    interface: str | None,
    timeout_s: float,
) -> None:
    """Join the ranks of the attempt. A collective: every rank calls it, rank 0 opens the store at `master`.

    Args:
        rank: of this process.
        world_size: ranks in all.
        local_rank: CUDA device of this process, where `device` is cuda.
        master: host and port of the TCPStore.
        device: cpu uses gloo, cuda NCCL.
        interface: network interface of the collectives, such as `lo`; None lets the backend choose.
        timeout_s: a collective that waits longer fails.
    """
    os.environ.update(rank_environment(rank, world_size, local_rank, master, device))
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ["NCCL_SOCKET_IFNAME"] = interface
    quiet()
    switch_off_builds()
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    backend = "gloo" if device == "cpu" else "nccl"
    timeout = timedelta(seconds=timeout_s)
    store = _open_store(rank, world_size, master, timeout)
    # bound to its GPU, as DeepSpeed 0.19.8 does where there are peers
    own = torch.device("cuda", local_rank) if device == "cuda" and world_size > 1 else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=own)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def _open_store(rank: int, world_size: int, master: tuple[str, int], timeout: timedelta) -> TCPStore:
    """The ranks' store. Rank 0 brings its own socket: torch 2.13 would listen on every interface, without a password.

    Raises:
        WorkerLostError: the address is none of this node's, or its port is taken.
    """
    if rank != 0:
        return TCPStore(*master, world_size, is_master=False, timeout=timeout)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(*master, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(world_size)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise WorkerLostError(
            f"Rank 0 cannot open its store at {master[0]}:{master[1]}: {error}. The address must be one of its node's, "
            "and the port free."
        ) from error
    # the store owns the descriptor from here on
    return TCPStore(*master, world_size, is_master=True, master_listen_fd=listener.detach(), timeout=timeout)


def close_process_group() -> None:
    """Leave the process group; does nothing where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def bound_all_groups(timeout: timedelta) -> None:
    """Give every process group our deadline; those that DeepSpeed makes come with torch's half hour."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timeout, group)
