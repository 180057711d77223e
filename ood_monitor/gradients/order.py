"""Along which dimension of a tensor the samples lie, in order, as operations tell.

The engine takes the rows of a tensor for those of the samples, in order. Which rows an operation
picks, and where it puts them, may depend on the data: lengths, an order, a mask. The comparison
with the loop on first use cannot see that, so it has to be known of each operation. Here is the
list of those of which it is known. After any other, and where samples are mixed or moved, nothing
is known. Then further backward passes tell whose the rows are
(:mod:`~ood_monitor.gradients.owners`), or the loop takes the parameters: exact, only slower.

A *sample dimension* of a tensor has n * k indices, of which the first k belong to the first
gradient, the next k to the second, and so on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ood_monitor.gradients import contractions, moves
from ood_monitor.gradients.call import OWNERS, Call, Found, functions

__all__ = ["CREATING", "SHAPED_BY_OTHERS", "sample_dimensions"]

_Rule = Callable[[Call], Found]


def sample_dimensions(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    results: Sequence[Tensor],
    n: int,
    known: Sequence[tuple[Tensor, int | None]],
) -> list[int | None]:
    """The sample dimension of each result of a call, or None where it is not known.

    Args:
        func: The operation.
        args: As it got them.
        kwargs: Likewise.
        results: The tensors that it gave, or wrote into.
        n: Number of gradients. The rows of a single one are in order however they lie.
        known: The data among its arguments, each with its sample dimension.
    """
    if n == 1 or not results:
        return [0] * len(results)
    if func is torch.autograd.grad:  # each gradient has its input's rows, whatever came between
        inputs = args[1] if isinstance(args[1], list | tuple) else args[1:2]
        return [next((d for t, d in known if t is x), None) for x in inputs]
    data = [(tensor, d) for tensor, d in known if d is not None]
    rule = _RULES.get(func)
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    if rule is None or len(data) < len(known) or kwargs.get("out") is not None:
        return [None] * len(results)
    try:
        found = rule(Call(func, args, kwargs, data, results[0], n))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        found = None  # a form of the call that its rule does not foresee
    each = found if isinstance(found, list) else [found] * len(results)
    if len(each) != len(results):
        return [None] * len(results)
    return [d if _divides(r, d, n) else None for r, d in zip(results, each, strict=True)]


def _divides(result: Tensor, d: int | None, n: int) -> bool:
    return d is not None and 0 <= d < result.ndim and result.shape[d] > 0 == result.shape[d] % n


_LINEAR_ALGEBRA = (
    *("cholesky", "cholesky_ex", "det", "eig", "eigh", "eigvals", "eigvalsh", "inv", "inv_ex"),
    *("lu_factor", "lu_factor_ex", "matrix_exp", "matrix_power", "matrix_rank", "pinv", "qr"),
    *("slogdet", "solve", "solve_ex", "solve_triangular", "svd", "svdvals"),
)


def _pointwise_names() -> Iterator[str]:
    """Of all operations that PyTorch itself marks as such, and of what is made of them."""
    for name in {name for owner in OWNERS for name in dir(owner)}:
        packet = getattr(torch.ops.aten, name.rstrip("_"), None)
        overloads: list[str] = getattr(packet, "overloads", list)()
        if any(torch.Tag.pointwise in getattr(packet, each).tags for each in overloads):
            yield name.rstrip("_")
    yield from _ALSO_POINTWISE.split()


_ALSO_POINTWISE = """
    absolute alpha_dropout arccos arccosh arcsin arcsinh arctan arctan2 arctanh as_tensor
    bernoulli bfloat16 bool broadcast_tensors byte cdouble cfloat chalf char clone complex conj
    conj_physical
    contiguous copy_ cpu cuda dequantize detach divide double dropout feature_alpha_dropout
    feature_dropout fill_ fix float floor_divide greater greater_equal gumbel half hardshrink imag
    int isclose isreal less less_equal log_sigmoid logsigmoid long multiply negative not_equal
    pin_memory polar poisson real relu6 requires_grad_ resolve_conj resolve_neg short softsign
    subtract tanhshrink to true_divide type type_as xpu zero_
"""
#: Of which only the first argument gives elements.
_SHAPED_BY_OTHERS = "expand_as reshape_as to type_as view_as"

_DUNDERS = """
    abs add and div eq floordiv ge gt invert le lshift lt mod mul ne neg or pos pow rshift sub
    truediv xor
"""

#: What is put in rows is the same in each of them.
_CREATED = "new_empty new_full new_ones new_zeros"
_CREATED_LIKE = "empty_like full_like ones_like rand_like randn_like zeros_like"

_VIEWS = """
    H T adjoint broadcast_to chunk diagonal expand expand_as mH mT moveaxis movedim narrow permute
    select split split_with_sizes squeeze swapaxes swapdims t tensor_split transpose unbind
    unsafe_chunk unsafe_split unsqueeze
"""


def _dunders(names: str) -> str:
    """The operators' methods, also reflected and in place."""
    return " ".join(f"__{kind}{name}__" for name in names.split() for kind in ("", "r", "i"))


#: Names, or names and where they are; and where the samples lie after them.
_LISTS: tuple[tuple[str | tuple[str, Any], _Rule], ...] = (
    (" ".join(_pointwise_names()), moves.pointwise),
    (_dunders(_DUNDERS), moves.pointwise),
    (("data", (Tensor,)), moves.pointwise),
    (_CREATED_LIKE, moves.pointwise),
    (_CREATED, moves.created),
    ("flatten ravel reshape reshape_as unflatten view view_as", moves.reshaped),
    (_VIEWS, moves.viewed),
    (("unfold", (Tensor,)), moves.viewed),
    ("repeat tile", moves.repeated),
    ("repeat_interleave", moves.repeated_rows),
    ("pad constant_pad_nd", moves.padded),
    ("flip", moves.flipped),
    ("cat concat concatenate", moves.joined),
    ("stack", moves.stacked),
    ("column_stack hstack", moves.beside),
    (
        "gather index_add index_copy index_fill index_reduce index_select scatter scatter_add "
        "scatter_reduce",
        moves.gathered,
    ),
    ("take_along_dim", moves.taken_along),
    ("__getitem__", moves.indexed),
    ("__setitem__", moves.written),
    ("max min", contractions.extremes),
    (
        "all amax amin any argmax argmin count_nonzero cummax cummin cumprod cumsum logcumsumexp "
        "logsumexp mean median mode nanmean nanmedian nansum prod std std_mean sum var var_mean "
        "log_softmax softmax softmin",
        contractions.along(1),
    ),
    ("argsort glu sort", contractions.along(1, -1)),
    ("norm roll", contractions.along(2)),
    ("diff kthvalue topk", contractions.along(2, -1)),
    ("normalize cosine_similarity", contractions.along(2, 1)),
    (("norm vector_norm", (torch.linalg,)), contractions.along(2)),
    (("matrix_norm", (torch.linalg,)), contractions.along(2, (-2, -1))),
    (("fft hfft ifft ihfft irfft rfft", (torch.fft,)), contractions.along(2, -1)),
    (("fft2 ifft2 irfft2 rfft2", (torch.fft,)), contractions.along(2, (-2, -1))),
    (
        "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy kl_div "
        "binary_cross_entropy_with_logits",
        contractions.loss,
    ),
    ("__matmul__ __rmatmul__ bmm dot matmul mm mv", contractions.product),
    ("addmm addmv baddbmm einsum ger outer tensordot", contractions.product),
    ("scaled_dot_product_attention", contractions.attention),
    ("multi_head_attention_forward", contractions.time_first_attention),
    ("gru lstm rnn_relu rnn_tanh", contractions.recurrent),
    ("bucketize one_hot view_as_complex view_as_real", contractions.leading(0)),
    # PyTorch's inner functions of these names take the table first.
    (("embedding", (F,)), contractions.leading(0)),
    (("embedding_bag", (F,)), contractions.batch_first(2)),
    ("bilinear diag_embed linear multinomial", contractions.leading(1)),
    ("det slogdet logdet matrix_exp matrix_power tril triu", contractions.leading(2)),
    ("pixel_shuffle pixel_unshuffle", contractions.leading(3)),
    ("layer_norm rms_norm", contractions.normalised),
    ((" ".join(_LINEAR_ALGEBRA), (torch.linalg,)), contractions.matrices),
    ("cdist inverse", contractions.matrices),
    ("searchsorted", contractions.searched),
    (
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
        "adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d batch_norm "
        "channel_shuffle dropout1d dropout2d dropout3d group_norm lp_pool1d lp_pool2d max_pool1d "
        "max_pool2d max_pool3d prelu",
        contractions.batch_first(2),
    ),
    (
        "cross_entropy gru_cell lstm_cell nll_loss rnn_relu_cell rnn_tanh_cell",
        contractions.batch_first(2, 2),
    ),
    ("instance_norm interpolate local_response_norm upsample", contractions.batch_first(3)),
    (("fold", (F,)), contractions.batch_first(3)),
    (("unfold", (F,)), contractions.batch_first(4)),
    ("affine_grid grid_sample", contractions.batch_first(3, 2)),
    (
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
        contractions.convolved,
    ),
)


def _table() -> dict[Callable[..., Any], _Rule]:
    """By function; the later of two rules counts."""
    table: dict[Callable[..., Any], _Rule] = {}
    for given, rule in _LISTS:
        names, owners = (given, OWNERS) if isinstance(given, str) else given
        table |= dict.fromkeys(functions(names, owners), rule)
        if rule not in (moves.viewed, moves.reshaped):  # which would change the argument's shape
            in_place = " ".join(f"{name}_" for name in names.split())
            table |= dict.fromkeys(functions(in_place, owners), rule)
    return table


_RULES = _table()

#: Functions that give constants: of what they are given, only shape or type count.
CREATING = frozenset(functions(f"{_CREATED} {_CREATED_LIKE} new_tensor"))

#: Functions of a tensor to which others give only shape or type.
SHAPED_BY_OTHERS = frozenset(functions(_SHAPED_BY_OTHERS))
