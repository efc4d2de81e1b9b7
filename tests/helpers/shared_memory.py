"""What is left in shared memory."""

import os


def shared_memory() -> set[str]:
    """Names in /dev/shm, but for semaphores of Python's `multiprocessing`.

    Tests that run beside this one start ranks with it, and no process of a node does.
    """
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}
