"""How much memory this process has held at most: of its GPU, or resident memory on CPUs."""

import torch

__all__ = ["peak_bytes", "resident_bytes"]


def peak_bytes(device: torch.device) -> int:
    """Most bytes so far: what the CUDA allocator gave out, or the peak of resident memory (VmHWM of proc(5))."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _proc_status("VmHWM")


def resident_bytes() -> int:
    """Resident memory now (VmRSS of proc(5))."""
    return _proc_status("VmRSS")


def _proc_status(key: str) -> int:
    """A size that Linux tells of this process, in bytes; 0 where it does not."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(f"{key}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
