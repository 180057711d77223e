"""The only randomness of a drift test: uniform numbers that break ties of ranks."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from ood_monitor.checks import whole

__all__ = ["TieBreaker"]

_SMALLEST = 2.0**-53


class TieBreaker:
    """Draws uniform numbers, and can be copied and kept.

    Args:
        domain: Keeps the numbers apart from those of other tests with the same seed, and from those
            that a user's generator with that seed makes the scores from.
        seed: A whole number from 0 on.

    Raises:
        TypeError: The seed is no whole number.
        ValueError: It is below 0.
    """

    def __init__(self, domain: int, seed: int) -> None:
        entropy = np.random.SeedSequence([domain, whole("seed", seed)])
        self._bits = np.random.PCG64(entropy)
        self._draw = np.random.Generator(self._bits).random

    def draw(self) -> float:
        """The next number, above 0 and below 1."""
        return self._draw() or _SMALLEST

    def copy(self) -> Self:
        """One that goes on from here, and changes nothing of this one."""
        return self._of(self._bits.state["state"])

    def state_dict(self) -> dict[str, str]:
        """Where it stands, as primitives for JSON."""
        # 128 bits: as text, since many a JSON reader makes a double of a number.
        return {name: str(value) for name, value in self._bits.state["state"].items()}

    @classmethod
    def of_state(cls, state: Mapping[str, str]) -> Self:
        """The one that goes on from what :meth:`state_dict` gave.

        Raises:
            KeyError: A part is missing.
            TypeError: A part is of another type.
            ValueError: A part is no number.
            OverflowError: It is too large.
        """
        return cls._of({name: int(state[name]) for name in ("state", "inc")})

    @classmethod
    def _of(cls, state: Any) -> Self:
        found = cls.__new__(cls)
        found._bits = np.random.PCG64(0)
        found._bits.state = {
            "bit_generator": "PCG64",
            "state": state,
            "has_uint32": 0,
            "uinteger": 0,
        }
        found._draw = np.random.Generator(found._bits).random
        return found
