"""How much memory a launch script may still take: what the machine has free, and what its control group leaves."""

from pathlib import Path

import torch

from data.simulate.forecast import available_memory

SHARE = 0.8  # of what is free; the rest is for others, and for what is read meanwhile


def memory_to_use(device: torch.device, max_gigabytes: float | None = None) -> int:
    """Bytes for encoding and decoding on a device: a share of what is free there, or less if so told."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    else:
        free = min([available_memory(), *control_group_rooms()])
    usable = int(SHARE * free)
    return usable if max_gigabytes is None else min(usable, int(max_gigabytes * 1e9))


def control_group_rooms(system: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that each limit on this process's control groups leaves, both versions of Linux's; none without limits.

    Cached files count as room, because the kernel drops them first.
    """
    groups = process.read_text().splitlines() if process.is_file() else []
    rooms = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        names = ("memory.max", "memory.current", "inactive_file")
        if controllers == "memory":
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        root = system / controllers
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            rooms += _read_room(group, *names)
    return rooms


def _read_room(group: Path, limit: str, usage: str, cached: str) -> list[int]:
    """Bytes left to one group; empty if it has no limit, or is not seen from inside a container."""
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return []
    files = sum(int(line.split()[1]) for line in lines if line.split()[0] == cached)
    return [] if most == "max" else [max(0, int(most) - used + files)]
