"""Caches of diffusers on a denoiser: passes of ours go round them, and leave what they hold.

A cache gives what an earlier step computed, so that a pass through it hangs on the calls before.
``enable_cache`` sets a flag, ``apply_first_block_cache`` and its kin do not: what both leave on the
modules are hooks, which are looked for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from ood_monitor.processes import Lock

__all__ = ["caches_in", "without_caches"]

#: Of which module of diffusers' hooks a cache's are.
_OF_CACHES = (
    "faster_cache",
    "first_block_cache",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "taylorseer_cache",
    "text_kv_cache",
)

#: What a hook puts around a module's forward.
_PARTS = ("pre_forward", "post_forward", "forward")

_going_round: ContextVar[bool] = ContextVar("ood_monitor_going_round", default=False)
#: Of each hook that has a way round: how many blocks use it, and what it had.
_ways: dict[int, tuple[int, dict[str, Any]]] = {}
_lock = Lock()


def caches_in(module: nn.Module) -> list[Any]:
    """The hooks of caches on a module and its parts."""
    return [
        hook
        for each in module.modules()
        for hook in getattr(each.__dict__.get("_diffusers_hook"), "hooks", {}).values()
        if type(hook).__module__.rpartition(".")[2] in _OF_CACHES
    ]


@contextmanager
def without_caches(module: nn.Module) -> Iterator[None]:
    """Passes of this thread, within the block, compute all; other threads' go on as they did."""
    hooks = caches_in(module)
    if not hooks:
        yield
        return
    with _lock:
        for hook in hooks:
            _enter(hook)
    token = _going_round.set(True)
    try:
        yield
    finally:
        _going_round.reset(token)
        with _lock:
            for hook in hooks:
                _leave(hook)


def _enter(hook: Any) -> None:
    users, had = _ways.get(id(hook), (0, {}))
    if not users:
        ref = hook.fn_ref
        had = {name: getattr(ref, name) for name in _PARTS}
        ref.forward = _either(had["forward"], ref.original_forward or had["forward"])
        ref.pre_forward = _either(had["pre_forward"], lambda _, *args, **kwargs: (args, kwargs))
        ref.post_forward = _either(had["post_forward"], lambda _, output: output)
    _ways[id(hook)] = users + 1, had


def _leave(hook: Any) -> None:
    users, had = _ways.pop(id(hook))
    if users > 1:
        _ways[id(hook)] = users - 1, had
        return
    for name, own in had.items():
        setattr(hook.fn_ref, name, own)


def _either(through: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        return (around if _going_round.get() else through)(*args, **kwargs)

    return called
