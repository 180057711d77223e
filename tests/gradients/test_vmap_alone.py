"""All norms by `vmap`, where a parameter has no rule and that is quicker than all else."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.model_case import Case, Function
from support.reference import counted, gradients
from torch import Tensor, nn
from torch.nn.modules.module import register_module_full_backward_hook

import ood_monitor as om
from ood_monitor.adapters.base import Batch, map_tensors
from ood_monitor.adapters.mapped import of_all
from ood_monitor.gradients import Way, gradient_norms
from ood_monitor.gradients.vmapped import is_quick_alone

VOCABULARY, PAD = 9, 0


def solved(m: Any, x: Tensor) -> Tensor:
    """An operation without a rule."""
    lower = m.lower.tril(-1) + torch.eye(3, dtype=x.dtype)
    return torch.linalg.solve_triangular(lower, m.f(x).tanh()[..., None], upper=False).squeeze(-1)


def ordered(m: Any, x: Tensor) -> Tensor:
    """Rows in an order of their own."""
    order = x[:, 0].sin().argsort()
    return m.g(m.f(x).tanh()[order])[order.argsort()]


def dense_experts(m: Any, x: Tensor) -> Tensor:
    """Each sample's expert, of weights that are put in rows."""
    chosen = torch.stack([m.f.weight, m.g.weight])[(x[:, 0] > 0).long()]
    return torch.einsum("bi,boi->bo", x, chosen)


def model(forward: Callable[..., Tensor], **parts: Any) -> nn.Module:
    torch.manual_seed(0)
    return Function(forward, f=nn.Linear(3, 3), g=nn.Linear(3, 3), **parts).double()


def of(forward: Callable[..., Tensor], **parts: Any) -> Case:
    adapter = om.LogLikelihood(
        model(forward, **parts), lambda m, x: -(m(x) - 1).square().flatten(1).sum(1)
    )
    return adapter, torch.randn(6, 3, dtype=torch.float64)


class Causal(nn.Module):
    """Logits from a running sum of embeddings, through an operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.mixed = nn.Bilinear(4, 4, 4)
        self.logits = nn.Linear(4, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embedding(input_ids)
        h = h if attention_mask is None else h * attention_mask[..., None]
        return self.logits(self.mixed(h.cumsum(1).tanh(), h))


def text(batch: Batch, **options: Any) -> Case:
    torch.manual_seed(0)
    return om.SequenceLikelihood(Causal().double(), **options), batch


def texts(left: int = 0, right: int = 0) -> Tensor:
    """Texts of 4 to 6 tokens, padded on either side."""
    own = torch.randint(1, VOCABULARY, (6, 6), generator=torch.Generator().manual_seed(2))
    for i in range(0, 6, 2):
        own[i, 4 + i // 2 :] = PAD
    own = torch.stack([row.roll(int((row == PAD).sum())) for row in own]) if left else own
    return F.pad(own, (left, right), value=PAD)


def masked(tokens: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}


CASES: dict[str, Callable[[], Case]] = {
    "a triangular solve": lambda: of(solved, lower=torch.rand(3, 3)),
    "rows in another order": lambda: of(ordered),
    "experts": lambda: of(dense_experts),
    "tokens": lambda: text(texts()),
    "texts padded on the right": lambda: text(texts(right=2), padding=PAD),
    "texts padded on the left": lambda: text(texts(left=2), padding=PAD),
    "texts with a mask": lambda: text(masked(texts(left=1))),
    "completions": lambda: text(texts(right=1), padding=PAD, given=2),
    "labels": lambda: text(
        (tokens := texts(right=1), tokens.where(torch.arange(7) > 1, -100)),
        padding=PAD,
        ignore_index=-100,
        labels=lambda batch: batch[1],
    ),
}


#: Of gradients (n, ...), by granularity; a vector is of one column.
SQUARES: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda g: g.square().flatten(1).sum(1),
    "row": lambda g: g.square().flatten(2).sum(2) if g.ndim > 2 else g.square(),
    "column": lambda g: (
        (g if g.ndim > 2 else g[..., None]).square().transpose(1, 2).flatten(2).sum(2)
    ),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_norms_are_exact_and_all_by_vmap(make: Callable[[], Case]) -> None:
    adapter, batch = make()
    exact = gradients(adapter, batch)
    for _ in range(2):
        found = gradient_norms(adapter, batch, report=True)
        assert {way.name for way in found.ways.values()} == {"vmap"}
        assert list(found.norms) == list(exact)
    for granularity, squares in SQUARES.items():
        norms = gradient_norms(adapter, batch, granularity=granularity)  # type: ignore[call-overload]
        for key, each in exact.items():
            torch.testing.assert_close(norms[key], squares(each), rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_batch_takes_two_forward_passes(make: Callable[[], Case]) -> None:
    adapter, batch = make()
    for _ in range(2):
        gradient_norms(adapter, batch)
    with counted(adapter.module) as seen:
        gradient_norms(adapter, batch)
    assert len(seen) == 2


def test_groups_chunks_and_single_samples_have_the_same_norms() -> None:
    adapter, x = of(ordered)
    for options in ({"group": 2}, {"chunk_size": 4}, {"chunk_size": 1}, {"layers": "g.*"}):
        found = gradient_norms(adapter, x, **options)  # type: ignore[call-overload]
        for key, each in gradients(adapter, x, options.get("group", 1)).items():  # type: ignore[arg-type]
            if key in found:
                norms = SQUARES["tensor"](each)
                torch.testing.assert_close(found[key], norms, rtol=1e-8, atol=1e-14)


def test_why_is_told_of_each_parameter() -> None:
    adapter, x = of(solved, lower=torch.rand(3, 3))
    ways = gradient_norms(adapter, x, report=True).ways
    assert "solve_triangular" in ways["lower"].reason
    assert "beside others" in ways["f.weight"].reason
    assert "order" in gradient_norms(*of(ordered), report=True).ways["g.weight"].reason


def test_layers_that_have_rules_are_taken_by_them() -> None:
    adapter, x = of(ordered)
    found = gradient_norms(adapter, x, layers="f.*", report=True)
    assert set(found.ways.values()) == {Way("rules")}


def test_what_is_checked_of_a_batch_is_checked() -> None:
    adapter, batch = text(texts())
    for _ in range(2):
        gradient_norms(adapter, batch)
    for wrong, message in ((-1, "from 0 on"), (VOCABULARY, "index out of range|logits of shape")):
        with pytest.raises((ValueError, IndexError), match=message):
            gradient_norms(adapter, torch.where(torch.arange(6) == 3, wrong, batch))


def test_layers_that_vmap_is_slow_for_keep_their_rules() -> None:
    names = {"weight", "bias"}
    assert is_quick_alone(nn.Linear(100, 100), 8, names)
    assert not is_quick_alone(nn.Conv2d(1, 1, 1), 8, names)
    assert not is_quick_alone(nn.Sequential(nn.Linear(1, 1), nn.GRU(1, 1)), 8, {"0.weight"})
    large = nn.Linear(2**12, 2**12, device="meta")
    assert not is_quick_alone(large, 8, names)
    assert is_quick_alone(large, 8, {"bias"})


def test_wide_layers_of_many_samples_keep_their_rules_but_for_long_texts() -> None:
    wide, names = nn.Linear(2**10, 2**10, device="meta"), {"weight"}
    assert is_quick_alone(wide, 4, names)
    assert not is_quick_alone(wide, 8, names)
    assert is_quick_alone(wide, 8, names, positions=2)
    assert is_quick_alone(wide, 64, names, positions=128)
    assert not is_quick_alone(wide, 65, names, positions=128)


def test_the_positions_of_a_sample_are_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from ood_monitor.gradients import ways

    told: list[int] = []
    monkeypatch.setattr(ways, "is_quick_alone", lambda *given: told.append(given[3]))
    gradient_norms(*text(masked(texts(right=2)), padding=PAD))
    gradient_norms(*of(ordered))
    gradient_norms(*of(ordered), group=2)
    gradient_norms(*text(texts()), group=2)
    assert told == [8, 1, 1, 12]


def test_values_that_differ_from_those_of_all_at_once_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ood_monitor.gradients import ways

    adapter, x = of(ordered)
    exact = gradient_norms(adapter, x)
    true = ways.vmapped_norms

    def other(*given: Any) -> Any:
        values, found = true(*given)  # type: ignore[misc]
        return {term: value + 1 for term, value in values.items()}, map_tensors(
            torch.zeros_like, found
        )

    monkeypatch.setattr(ways, "vmapped_norms", other)
    found = gradient_norms(adapter, x, report=True)
    assert {way.name for way in found.ways.values()} == {"rules", "rows"}
    for key, values in found.norms.items():
        torch.testing.assert_close(values, exact[key])


class Several(om.Adapter):
    """Terms of one pass and of another."""

    def __init__(self) -> None:
        self.module = model(ordered)

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        yield "first", -self.module(batch).square().sum(1)
        yield "second", self.module(batch / 2).sum(1)


def test_terms_have_norms_of_their_own() -> None:
    adapter, x = Several(), torch.randn(6, 3, dtype=torch.float64)
    found = gradient_norms(adapter, x, report=True)
    assert {way.name for way in found.ways.values()} == {"vmap"}
    for key, each in gradients(adapter, x).items():
        torch.testing.assert_close(found.norms[key], SQUARES["tensor"](each), rtol=1e-8, atol=1e-14)


def test_what_is_asked_of_all_samples_is_not_that_of_one() -> None:
    def largest(x: Tensor) -> Tensor:
        return x + int(of_all(x).max())

    x = torch.arange(3)
    assert torch.equal(torch.func.vmap(largest)(x), x + 2)
    twice = torch.func.vmap(torch.func.vmap(largest))
    assert torch.equal(twice(x.expand(2, 3)), (x + 2).expand(2, 3))
    assert torch.equal(
        torch.func.vmap(torch.func.grad(lambda y: y * int(of_all(y).max())))(x.float()),
        torch.full((3,), 2.0),
    )
    assert of_all(x) is x


def held_beside(m: Any, x: Tensor) -> Tensor:
    """Two experts, of which a list holds the second one's weight too."""
    both = torch.stack([m.f(x), x @ m.kept[0]], 1)
    mine = torch.arange(2) == (x[:, :1] > 0)
    return solved(m, torch.where(mine.unsqueeze(2), both, 0).sum(1))


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_that_vmap_does_not_replace_are_not_taken_by_it(frozen: bool) -> None:
    adapter, x = of(held_beside, lower=torch.rand(3, 3))
    adapter.module.kept = [adapter.module.g.weight]  # type: ignore[union-attr]
    adapter.module.g.requires_grad_(not frozen)  # type: ignore[union-attr]
    x[:, 0] = x[:, 0].abs() * torch.tensor([-1, -1, 1, 1, -1, 1])  # the first ones show nothing
    for _ in range(4):
        found = gradient_norms(adapter, x)
        adapter.module.requires_grad_(True)
        for key, each in gradients(adapter, x).items():
            norms = SQUARES["tensor"](each)
            torch.testing.assert_close(found[key], norms, rtol=1e-8, atol=1e-14)
        adapter.module.g.requires_grad_(not frozen)  # type: ignore[union-attr]


class Beside(om.Adapter):
    """With an encoder that is no part of the model, and needs gradients."""

    def __init__(self) -> None:
        self.module, self.encoder = model(ordered), nn.Linear(3, 3).double()

    def log_likelihood(self, batch: Batch) -> Iterable[tuple[str, Tensor]]:
        yield "log_likelihood", -self.module(self.encoder(batch)).square().sum(1)


def test_weights_of_another_module_are_no_hindrance() -> None:
    adapter, x = Beside(), torch.randn(6, 3, dtype=torch.float64)
    found = gradient_norms(adapter, x, report=True)
    assert {way.name for way in found.ways.values()} == {"vmap"}
    assert not any(norms.requires_grad for norms in found.norms.values())
    for key, each in gradients(adapter, x).items():
        torch.testing.assert_close(found.norms[key], SQUARES["tensor"](each), rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_half_precision_is_no_hindrance(dtype: torch.dtype, seed: int) -> None:
    adapter, _ = of(lambda m, x: m.mixed(m.f(x).tanh(), x), mixed=nn.Bilinear(3, 3, 3))
    adapter.module.to(dtype)
    x = 10 * torch.randn(33, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for _ in range(4):
        found = gradient_norms(adapter, x, report=True)
        assert {way.name for way in found.ways.values()} == {"vmap"}


KEPT: dict[str, Any] = {}


def put(m: Any, x: Tensor) -> Tensor:
    """The last hidden state, in a global dictionary."""
    KEPT["hidden"] = x.tanh()
    return solved(m, x)


def appended(m: Any, x: Tensor) -> Tensor:
    KEPT.setdefault("all", []).append(m.f(x))
    return solved(m, x)


@pytest.mark.parametrize("forward", [put, appended])
def test_what_a_model_keeps_is_a_tensor_that_can_be_used(forward: Callable[..., Tensor]) -> None:
    KEPT.clear()
    adapter, x = of(forward, lower=torch.rand(3, 3))
    for _ in range(2):
        found = gradient_norms(adapter, x)
    for tensor in [KEPT["hidden"]] if forward is put else KEPT["all"]:
        assert tensor.sum().isfinite()
    for key, each in gradients(adapter, x).items():
        torch.testing.assert_close(found[key], SQUARES["tensor"](each), rtol=1e-8, atol=1e-14)


def test_what_is_kept_by_a_hook_that_comes_later_can_be_used() -> None:
    adapter, x = of(solved, lower=torch.rand(3, 3))
    gradient_norms(adapter, x)
    KEPT.clear()
    adapter.module.f.register_forward_hook(put_output)  # type: ignore[union-attr]
    gradient_norms(adapter, x)
    assert KEPT["output"].sum().isfinite()


def put_output(module: nn.Module, given: Any, output: Tensor) -> None:
    KEPT["output"] = output


def test_what_a_view_keeps_of_itself_is_no_hindrance() -> None:
    def kept(m: Any, x: Tensor) -> Tensor:
        m.last, m.own = x.tanh(), m  # a cycle
        return solved(m, x)

    adapter, x = of(kept, lower=torch.rand(3, 3))
    for _ in range(2):
        found = gradient_norms(adapter, x, report=True)
        assert {way.name for way in found.ways.values()} == {"vmap"}
    assert not hasattr(adapter.module, "last")


def test_hooks_of_all_modules_do_not_meet_what_is_ours() -> None:
    adapter, x = of(ordered)
    handle = register_module_full_backward_hook(lambda module, given, got: None)
    try:
        found = gradient_norms(adapter, x, report=True)
    finally:
        handle.remove()
    assert {way.name for way in found.ways.values()} == {"vmap"}


def test_a_warning_of_the_model_is_not_shown_again_by_each_batch() -> None:
    def warning(m: Any, x: Tensor) -> Tensor:
        warnings.warn("once", stacklevel=1)
        return solved(m, x)

    adapter, x = of(warning, lower=torch.rand(3, 3))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        before = list(warnings.filters)
        for _ in range(4):
            found = gradient_norms(adapter, x, report=True)
        assert list(warnings.filters) == before
    assert {way.name for way in found.ways.values()} == {"vmap"}
    assert len(shown) == 1


def test_batches_that_vmap_fails_for_are_seldom_tried() -> None:
    def looking(m: Any, x: Tensor) -> Tensor:
        if x.shape[1] == 4:
            assert x.isfinite().all()
        return ordered(m, x[:, :3])

    adapter, x = of(looking)
    for _ in range(2):
        gradient_norms(adapter, x)
    wider = F.pad(x, (0, 1))
    with counted(adapter.module) as seen:
        for _ in range(32):
            found = gradient_norms(adapter, wider, report=True)
    assert {way.name for way in found.ways.values()} == {"rules", "rows"}
    assert len(seen) <= 32 + 2 * 7
    ways = [gradient_norms(adapter, x, report=True).ways for _ in range(40)]
    assert {way.name for way in ways[-1].values()} == {"vmap"}  # as soon as it is tried again


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_function_that_is_compiled_runs_as_before() -> None:
    compiled: list[int] = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        compiled.append(1)
        return graph.forward

    doubled = torch.compile(lambda h: 2 * h.sin(), backend=backend)
    adapter, x = of(lambda m, x: solved(m, doubled(x)), lower=torch.rand(3, 3))
    found = gradient_norms(adapter, x, report=True)
    assert {way.name for way in found.ways.values()} == {"vmap"}
    seen = len(compiled)
    for _ in range(3):
        again = gradient_norms(adapter, x)
    assert len(compiled) == seen
    for key, each in gradients(adapter, x).items():
        torch.testing.assert_close(again[key], SQUARES["tensor"](each), rtol=1e-8, atol=1e-14)
