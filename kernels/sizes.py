"""Sizes of grids and blocks; Triton's own functions of these names take microseconds each."""


def cdiv(n: int, size: int) -> int:
    """Blocks of `size` that hold n."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The lowest power of 2 that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def all_whole(lead: int, unit: int, keys: int) -> bool:
    """Whether unit u is exactly the keys [u * unit, (u + 1) * unit), as `Plan.lead` tells."""
    return lead == 0 and keys % unit == 0
