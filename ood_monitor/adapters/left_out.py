"""What stands in a batch in the place of a field that is left out: whoever uses it is told."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

__all__ = ["LeftOut", "LeftOutError"]


class LeftOutError(ValueError):
    """A field is used that was left out of the batch."""


class LeftOut:
    """Refuses every use: an attribute, an operation, a call, a test of its type, PyTorch.

    Its name may be shown, and it may be copied. What it is must be asked by ``type(value)``.

    Args:
        path: Where it stands in the batch.
        used: Is given the path when it is used, should the error be swallowed.
    """

    __slots__ = ("_path", "_used")

    def __init__(self, path: str, used: set[str]) -> None:
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_used", used)

    def __repr__(self) -> str:
        return f"<left out: {object.__getattribute__(self, '_path')}>"

    def __getattribute__(self, name: str) -> Any:
        if name in ("__torch_function__", "__copy__", "__deepcopy__"):
            return object.__getattribute__(self, name)
        _refuse(self)

    def __copy__(self) -> "LeftOut":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "LeftOut":
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        _refuse(next(_in([*args, *(kwargs or {}).values()])))


def _refuse(value: LeftOut, *args: Any, **kwargs: Any) -> NoReturn:
    path = object.__getattribute__(value, "_path")
    object.__getattribute__(value, "_used").add(path)
    raise LeftOutError(
        f"Expected a model that uses the same fields of every batch, got a use of {path}, which it "
        "ignored when it was first called and which cannot be cut by sample, so that it is left "
        "out. Give a tensor with a row for each sample in its place."
    )


def _in(values: Iterable[Any]) -> Iterator[LeftOut]:
    """Those in arguments of one of PyTorch's functions."""
    for value in values:
        if type(value) is LeftOut:
            yield value
        elif type(value) in (list, tuple):
            yield from _in(value)


#: What Python looks for in a class and not in its object.
_SPECIAL = (
    *("abs", "add", "and", "array", "bool", "bytes", "call", "complex", "contains", "delattr"),
    *("delitem", "dir", "divmod", "enter", "eq", "exit", "float", "floordiv", "format", "ge"),
    *("getitem", "gt", "hash", "iadd", "iand", "imul", "index", "int", "invert", "ior", "isub"),
    *("iter", "itruediv", "le", "len", "lshift", "lt", "matmul", "mod", "mul", "ne", "neg"),
    *("next", "or", "pos", "pow", "radd", "rand", "rdivmod", "reduce_ex", "reversed"),
    *("rfloordiv", "rlshift", "rmatmul", "rmod", "rmul", "ror", "round", "rpow", "rrshift"),
    *("rshift", "rsub", "rtruediv", "rxor", "setattr", "setitem", "str", "sub", "truediv", "xor"),
)

for _name in _SPECIAL:
    setattr(LeftOut, f"__{_name}__", _refuse)
