"""Recurrent layers and their cells in operations that have rules.

PyTorch's own are one operation for all steps, whose weights' gradients it gives summed. Here the
input's map is one for all steps, and so is the state's as the recorder sees it: a linear map of
states that are put in its place once they are known. Its result is the map's bias, to which each
step adds its state's part, so that its gradient is that of all steps. The steps themselves are made
past the recorder, with weights that are constants: between the maps there are none.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["REWRITTEN"]

_State: TypeAlias = tuple[Tensor, ...]

#: Tells the recorder of a tensor that was made past it of data, and along which dimension the
#: samples lie in it, if their order is known.
_Mark: TypeAlias = Callable[[Tensor, int], Tensor]

#: (the input's gates, the state's gates, state) to the next state, whose first is the output.
_Cell: TypeAlias = Callable[[Tensor, Tensor, _State], _State]


def _lstm_step(gates: Tensor, own: Tensor, state: _State) -> _State:
    i, f, g, o = (gates + own).chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(gates: Tensor, own: Tensor, state: _State) -> _State:
    reset, update, new = gates.chunk(3, 1)
    own_reset, own_update, own_new = own.chunk(3, 1)
    new = (new + (reset + own_reset).sigmoid() * own_new).tanh()
    return (torch.lerp(new, state[0], (update + own_update).sigmoid()),)


def _plain_step(
    activation: Callable[[Tensor], Tensor], gates: Tensor, own: Tensor, state: _State
) -> _State:
    return (activation(gates + own),)


def _layers(
    step: _Cell,
    mark: _Mark,
    x: Tensor,
    states: Any,
    weights: Any,
    has_biases: Any,
    layers: Any,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> Any:
    """As :func:`torch.lstm` and its like; NotImplemented of a variant left out."""
    packed = not isinstance(has_biases, bool)  # whose second argument is the sizes of its batches
    if packed or x.ndim != 3 or (train and dropout > 0):
        return NotImplemented
    if len(weights) != layers * (1 + bidirectional) * (4 if has_biases else 2):
        return NotImplemented  # projections
    starts = [states] if isinstance(states, Tensor) else list(states)
    directions, time = 1 + bidirectional, 1 if batch_first else 0
    each = len(weights) // (layers * directions)
    finals: list[_State] = []
    for layer in range(layers):
        outputs: list[Tensor] = []
        for direction in range(directions):
            k = layer * directions + direction
            own = weights[k * each : (k + 1) * each]
            start = tuple(state[k] for state in starts)
            output, final = _over_time(step, mark, x, start, own, time, direction == 1)
            outputs.append(output)
            finals.append(final)
        x = outputs[0] if directions == 1 else torch.cat(outputs, 2)
    with torch._C.DisableTorchFunction():
        last = [torch.stack(each) for each in zip(*finals, strict=True)]
    return (x, *(mark(each, 1) for each in last))


def _over_time(
    step: _Cell,
    mark: _Mark,
    x: Tensor,
    state: _State,
    weights: Sequence[Tensor],
    time: int,
    backwards: bool,
) -> tuple[Tensor, _State]:
    """Outputs in the order of time, and the last state."""
    biases = weights[2:] or (None, None)
    gates = F.linear(x, weights[0], biases[0])
    states = _zeros(gates, weights[1])
    own = F.linear(states, weights[1], biases[1])
    with torch._C.DisableTorchFunction():
        hidden, before, outputs = weights[1].detach().T, [], []
        pairs = list(zip(gates.unbind(time), own.unbind(time), strict=True))
        for each, offset in reversed(pairs) if backwards else pairs:
            before.append(state[0])
            state = step(each, torch.addmm(offset, state[0], hidden), state)
            outputs.append(state[0])
        if backwards:
            before, outputs = before[::-1], outputs[::-1]
        # Past its version: what was computed of it is what it says.
        states.data.copy_(torch.stack(before, time))
        output = torch.stack(outputs, time)
    return mark(output, 1 - time), state


def _zeros(gates: Tensor, weight: Tensor) -> Tensor:
    """What a weight maps to gates, with the rows of the samples where these have them."""
    first = gates.detach()[..., :1]
    return first.expand(*gates.shape[:-1], weight.shape[1]).clone().zero_()


def _one_step(
    step: _Cell,
    mark: _Mark,
    x: Tensor,
    state: Any,
    input_weight: Tensor,
    hidden_weight: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> Any:
    """As :func:`torch.lstm_cell` and its like."""
    if x.ndim != 2:
        return NotImplemented
    start = (state,) if isinstance(state, Tensor) else tuple(state)
    gates = F.linear(x, input_weight, input_bias)
    # A state that is a constant is of the samples all the same: of its map there is a use.
    own = F.linear(start[0] + _zeros(gates, hidden_weight), hidden_weight, hidden_bias)
    with torch._C.DisableTorchFunction():
        following = step(gates, own, start)
    marked = tuple(mark(each, 0) for each in following)
    return marked[0] if isinstance(state, Tensor) else marked


_STEPS: dict[str, _Cell] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": partial(_plain_step, torch.tanh),
    "rnn_relu": partial(_plain_step, torch.relu),
}

#: By the function that PyTorch is asked for.
REWRITTEN: dict[Callable[..., Any], Callable[..., Any]] = {
    **{getattr(torch, name): partial(_layers, step) for name, step in _STEPS.items()},
    **{getattr(torch, f"{name}_cell"): partial(_one_step, step) for name, step in _STEPS.items()},
}
