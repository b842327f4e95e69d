"""How much memory there is."""

import pathlib


def free_bytes() -> int | None:
  """Memory that a new program can have, the container's limit included; None where unknown."""
  values = []
  try:
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
      if line.startswith("MemAvailable:"):
        values.append(int(line.split()[1]) * 1024)
  except (OSError, ValueError, IndexError):
    pass
  try:  # cgroup v2
    limit = pathlib.Path("/sys/fs/cgroup/memory.max").read_text().strip()
    if limit != "max":
      used = int(pathlib.Path("/sys/fs/cgroup/memory.current").read_text())
      values.append(int(limit) - used)
  except (OSError, ValueError):
    pass
  return min(values) if values else None
