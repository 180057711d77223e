"""Whether bytes hold a pickle: found by its opcodes, not by the name of a file."""

import pickletools

__all__ = ["pickles_in"]

_ZIP = b"PK\x03\x04"  # what torch.save and numpy.savez write, with pickles inside


def pickles_in(content: bytes) -> list[int]:
    """Where a zip archive, or a pickle of protocol 2 or later that can be read, begins."""
    starts = [i for i in range(len(content) - 1) if content[i] == 0x80 and 2 <= content[i + 1] <= 5]
    found = [i for i in starts if _is_pickle(content[i:])]
    return found + ([content.index(_ZIP)] if _ZIP in content else [])


def _is_pickle(content: bytes) -> bool:
    try:
        for _ in pickletools.genops(content):
            pass
    except (ValueError, UnicodeDecodeError):
        return False
    return True
