"""Which weights a module has now, told without a wait for the digest of all of them.

A state is what a look of milliseconds sees: names, shapes and types of the weights in use, how
often they were written to, and a few elements of each. One that was read before needs no reading,
nor does one with other elements than the weights that it is compared with. All others are read in
a thread.
"""

import hashlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ood_monitor.densities.base import Array
from ood_monitor.modules import fully_sharded, weights_in_use
from ood_monitor.processes import Lock, after_fork_in_child_of
from ood_monitor.saving.fingerprints import digest_of_tensors, read_weights

__all__ = ["KnownWeights", "State"]

_log = logging.getLogger(__name__)

#: Elements of each weight that are looked at, states whose digests are kept, and times that weights
#: are read which are written to meanwhile.
_ELEMENTS, _KEPT, _TRIES = 16, 100, 3

#: By how much, of the largest element, two states differ that are one but for rounding.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class State:
    """What a look at a module's weights sees.

    Attributes:
        structure: Of their names, shapes and types.
        writes: Of which tensors they are and how often they were written to.
        elements: A few of each, float64.
    """

    structure: str
    writes: int
    elements: Array = field(compare=False)

    @property
    def content(self) -> tuple[str, bytes]:
        """What is the same wherever the same weights are."""
        return self.structure, self.elements.tobytes()

    @property
    def key(self) -> tuple[str, bytes, int]:
        """What is the same as long as nothing was written."""
        return *self.content, self.writes

    def is_like(self, other: "State") -> bool:
        """Whether it is the other but for rounding, as after a LoRA was fused and taken out."""
        if self.structure != other.structure:
            return False
        a, b = self.elements, other.elements
        largest = np.nanmax(np.abs(b), initial=0.0)
        return bool(np.allclose(a, b, rtol=0, atol=_ROUNDING * largest, equal_nan=True))


class KnownWeights:
    """What is known of the weights that a module has had: one for each module.

    What it starts is bound to the process and ends with it: a forked child begins without, and at
    exit a thread stops at the next tensor.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[str, bytes, int], str] = {}
        self._contents: dict[str, tuple[str, bytes]] = {}
        self._lock = Lock()
        self._thread: threading.Thread | None = None
        self._waiting: list[Callable[[], None]] = []
        after_fork_in_child_of(self, KnownWeights._forget_thread)

    @classmethod
    def of(cls, module: nn.Module) -> "KnownWeights":
        """The one of a module."""
        with _lock:
            return _known.setdefault(module, cls())

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read yet."""
        return not self._digests

    def state(self, module: nn.Module) -> State:
        """Look at the weights as they are now."""
        return _state(module)

    def differ(self, state: State, digest: str) -> bool | None:
        """Whether a state is of other weights than a digest's; None if they must be read for it."""
        with self._lock:
            if (found := self._digests.get(state.key)) is not None:
                return found != digest
            of_digest = self._contents.get(digest, state.content)
            return True if of_digest != state.content else None

    def digest(self, module: nn.Module) -> str:
        """Of the weights as they are now; all are read unless this state was.

        Weights that are written to all the while are as they were read last.
        """
        found = ""
        for _ in range(_TRIES):
            before = _state(module)
            with self._lock:
                known = self._digests.get(before.key)
            if known is not None:
                return known
            found = digest_of_tensors(read_weights(module))
            if self._keep(module, before, found):
                break
        return found

    def read_later(self, module: nn.Module, then: Callable[[], None]) -> None:
        """Read the weights in a thread, and call a function when a state's digest is known.

        One thread at a time: while it reads, further functions wait with it, as many as states are
        kept. Shards are read at once, which all processes must take part in.
        """
        if fully_sharded(module):
            self.digest(module)
            then()
            return
        with self._lock:
            if len(self._waiting) < _KEPT:
                self._waiting.append(then)
            if self._thread is not None:
                return
            # No daemon: one that runs C++ while the interpreter ends would abort the process.
            thread = threading.Thread(
                target=self._read, args=(weakref.ref(module),), name="ood-monitor-weights"
            )
            thread.start()
            self._thread = thread

    def flush(self, timeout: float) -> bool:
        """Wait until what was to be read later is; False if the time is up first."""
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    def _forget_thread(self) -> None:
        self._thread, self._waiting = None, []

    def _read(self, reference: "weakref.ref[nn.Module]") -> None:
        is_known = False
        try:
            for _ in range(_TRIES):
                module = reference()
                if module is None or is_known:
                    break
                before = _state(module)
                found = digest_of_tensors(_while_running(read_weights(module)))
                is_known = self._keep(module, before, found)
        except Exception:  # whatever weights raise that are moved; the next call reads again
            _log.debug("Could not read a model's weights in the background.", exc_info=True)
        finally:
            with self._lock:
                waiting, self._waiting, self._thread = self._waiting, [], None
        for then in waiting if is_known else ():
            then()

    def _keep(self, module: nn.Module, before: State, digest: str) -> bool:
        """Remember a digest, unless the weights were written to while they were read."""
        if _state(module).key != before.key:
            return False
        with self._lock:
            for kept in (self._digests, self._contents):
                while len(kept) >= _KEPT:
                    kept.pop(next(iter(kept)))  # type: ignore[call-overload]
            self._digests[before.key], self._contents[digest] = digest, before.content
        return True


_known: weakref.WeakKeyDictionary[nn.Module, KnownWeights] = weakref.WeakKeyDictionary()
_lock = Lock()


def _state(module: nn.Module) -> State:
    named = [*weights_in_use(module), *_persistent(module)]
    # Of those that are kept elsewhere while they are not needed another object is made each time.
    own = {id(parameter) for parameter in module.parameters() if not parameter.is_meta}
    structure, found = hashlib.sha256(), dict[tuple[torch.device, torch.dtype], list[Tensor]]()
    for name, tensor in named:
        structure.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        few = _few(tensor.detach())
        found.setdefault((few.device, few.dtype), []).append(few)
    writes = hash(tuple((id(t) if id(t) in own else 0, _version(t)) for _, t in named))
    elements = [torch.cat(parts).double().cpu().numpy() for parts in found.values()]
    return State(structure.hexdigest(), writes, np.concatenate([np.empty(0), *elements]))


def _few(tensor: Tensor) -> Tensor:
    """A few elements; none of a foreign kind of tensor that gives none."""
    try:
        flat = tensor.flatten()
        return flat[:: max(1, len(flat) // _ELEMENTS)]
    except (NotImplementedError, RuntimeError, TypeError):
        return torch.empty(0, dtype=torch.float64, device=tensor.device)


def _persistent(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, part in module.named_modules():
        for key, buffer in part._buffers.items():
            if buffer is not None and key not in part._non_persistent_buffers_set:
                yield f"{name}.{key}", buffer


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _while_running(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same, as long as the interpreter is not about to end."""
    for item in named:
        if not threading.main_thread().is_alive():
            raise RuntimeError("The interpreter ends.")
        yield item
