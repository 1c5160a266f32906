"""How much memory there is. Standard library only."""


def available_bytes() -> int | None:
    """Memory that can be had without swapping, where the system says it."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")), None)
    except (OSError, ValueError):
        return None
