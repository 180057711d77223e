"""What denoisers leave of samples without noise, against loops over samples in float64."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import fft
from support.diffusers_cases import FAMILIES, Family
from support.model_case import Function, perturbed
from torch import Tensor, nn

import ood_monitor as om
from ood_monitor.adapters.base import map_tensors, pieces
from ood_monitor.statistics import DenoiserStatistics, denoiser_statistics, denoising
from ood_monitor.statistics.spectrum import band_energies, lag_cosines

GROUPS = 32
PRODUCTS = torch.linspace(0.9999, 0.01, 1000)

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def of_family(family: Family, count: int = 4) -> tuple[om.DenoisingBound, Any]:
    """In double precision."""
    network = family.network().double()
    perturbed(network)
    batch = family.batch(count)
    double = map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)
    return family.adapter(network.eval()), double


def of_layer(layer: nn.Module, *after: nn.Module) -> om.DenoisingBound:
    """A denoiser that ends in a layer."""
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), layer, *after).double()
    network = Function(lambda m, x, t: m.net(x), net=net)
    return om.DenoisingBound(network, PRODUCTS, ratios=[0.02, 3.0])


def columns_of(found: DenoiserStatistics) -> Iterator[tuple[str, Tensor]]:
    for kind in ("output_layer", "energies", "cosines"):
        yield from getattr(found, kind).items()


def differentiated(adapter: om.Adapter, batch: Any, weight: nn.Parameter, axis: int) -> Any:
    """Squared gradients of half the squared residual, by group of channels, by level."""
    found: dict[str, list[Tensor]] = {}
    for sample in pieces(batch, 1):
        for name, residual in adapter.residuals(sample):
            [gradient] = torch.autograd.grad(0.5 * residual.square().sum(), weight)
            by_channel = gradient.square().movedim(axis, 0).flatten(1).sum(1)
            sums = torch.zeros(min(GROUPS, len(by_channel)), dtype=torch.float64)
            sums.index_add_(0, torch.arange(len(by_channel)) % GROUPS, by_channel)
            found.setdefault(f"{name}/norm", []).append(sums)
    return {name: torch.stack(sums) for name, sums in found.items()}


@every_family
def test_norms_of_the_last_layer_are_those_of_automatic_differentiation(family: Family) -> None:
    adapter, batch = of_family(family)
    last = next(n for n in ("conv_out", "proj_out_2", "proj_out") if hasattr(adapter.module, n))
    weight = adapter.module.get_parameter(f"{last}.weight")
    found = denoiser_statistics(adapter, batch).output_layer
    for name, expected in differentiated(adapter, batch, weight, 1).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=0)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[nn.Module, ...]]] = {
    "plain": (lambda: nn.Conv2d(3, 2, 3, padding=1), ()),
    "wide": (lambda: nn.Conv2d(3, 2, (5, 1), padding=(2, 0)), ()),
    "same": (lambda: nn.Conv2d(3, 2, (5, 3), padding="same"), ()),
    "circular": (lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), ()),
    "dilated": (lambda: nn.Conv2d(3, 2, 3, padding=2, dilation=2), ()),
    "strided": (lambda: nn.Conv2d(3, 8, 2, stride=2), (nn.PixelShuffle(2),)),
    "strided with a rest": (
        lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1),
        (nn.PixelShuffle(2),),
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1),
        (nn.AvgPool2d(2),),
    ),
    "many channels": (lambda: nn.Sequential(nn.Conv2d(3, 40, 1), nn.Conv2d(40, 2, 1)), ()),
    "learned variance": (lambda: nn.Conv2d(3, 4, 3, padding=1), ()),
    "more after it": (lambda: nn.Conv2d(3, 2, 1), (nn.Tanh(),)),
    "written over": (lambda: nn.Conv2d(3, 2, 1), (nn.LeakyReLU(0.3, inplace=True),)),
}


def apart(adapter: om.DenoisingBound, sample: Tensor, layer: nn.Module, level: str) -> Tensor:
    """sum_c over p and d of |R(p)|^2 h_c(p + d)^2, one channel at a time."""
    seen: dict[str, Tensor] = {}

    def see(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen["h"], seen["y"] = args[0].detach(), output.detach().requires_grad_()
        return seen["y"] * 1

    handle = layer.register_forward_hook(see)
    residual = dict(adapter.residuals(sample))  # the last level's tensors are in `seen`
    handle.remove()
    [r] = torch.autograd.grad(0.5 * residual[level].square().sum(), seen["y"])
    ones = [torch.zeros_like(p).copy_(p) for p in layer.parameters()]
    for p in layer.parameters():
        p.data.zero_()
    sums = []
    for c in range(seen["h"].shape[1]):
        weight = next(layer.parameters())
        axis = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
        weight.data.zero_().select(axis, c).fill_(1.0)
        # Of a kernel of ones, the squares that each output sees.
        sums.append((layer(seen["h"].square()) * r.square()).sum().detach())
    for p, kept in zip(layer.parameters(), ones, strict=True):
        p.data.copy_(kept)
    return torch.stack(sums)


@pytest.mark.parametrize("name", LAYERS)
def test_every_last_layer_has_the_sums_of_a_loop(name: str) -> None:
    make, after = LAYERS[name]
    layer = make()
    adapter = of_layer(layer, *after)
    x = torch.randn(3, 2, 6, 8, dtype=torch.float64)
    last = layer[-1] if isinstance(layer, nn.Sequential) else layer
    found = denoiser_statistics(adapter, x).output_layer
    axis = 0 if isinstance(last, nn.ConvTranspose2d) else 1
    for key, expected in differentiated(adapter, x, last.weight, axis).items():
        torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=0)
    level = [key for key in found if key.endswith("/apart")][-1]
    if last.weight.shape[axis] <= GROUPS:
        loops = [apart(adapter, one, last, level.removesuffix("/apart")) for one in x.split(1)]
        torch.testing.assert_close(found[level], torch.stack(loops), rtol=1e-9, atol=1e-12)


def test_energies_are_of_what_each_layer_is_given() -> None:
    adapter, x = of_layer(nn.Conv2d(3, 2, 1)), torch.randn(3, 2, 6, 8, dtype=torch.float64)
    found = denoiser_statistics(adapter, x).energies
    level, alpha = adapter.schedule.nearest(0.02), adapter.schedule.alpha
    own = (float(alpha[level]) * x).square().flatten(1).sum(1)
    torch.testing.assert_close(found[f"t={level}/input.net.0"], own)
    inner = adapter.module.net[:2](float(alpha[level]) * x)
    torch.testing.assert_close(
        found[f"t={level}/input.net.2"], inner.detach().square().flatten(1).sum(1)
    )


@every_family
def test_a_sample_has_the_same_alone_in_any_batch_and_in_single_precision(family: Family) -> None:
    adapter, batch = of_family(family, 5)
    together = dict(columns_of(denoiser_statistics(adapter, batch)))
    backwards = map_tensors(lambda t: t.flip(0), batch)
    chunked = dict(columns_of(denoiser_statistics(adapter, backwards, chunk_size=2)))
    for name, values in together.items():
        assert values.isfinite().all()
        torch.testing.assert_close(chunked[name].flip(0), values, rtol=1e-6, atol=1e-9)
    single = family.adapter(adapter.module.float())
    low = map_tensors(lambda t: t.float() if t.is_floating_point() else t, batch)
    for name, values in columns_of(denoiser_statistics(single, low)):
        torch.testing.assert_close(
            values, together[name].float(), rtol=1e-2, atol=1e-3 * float(together[name].max())
        )


@every_family
def test_the_model_is_left_as_it_was(family: Family) -> None:
    adapter, batch = of_family(family)
    before = {name: value.clone() for name, value in adapter.module.state_dict().items()}
    given, start = map_tensors(torch.clone, batch), torch.get_rng_state()
    denoiser_statistics(adapter, batch)
    after = adapter.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(given[name], batch[name]) for name in given)
    assert all(p.grad is None and p.requires_grad for p in adapter.module.parameters())
    assert all(not part._forward_hooks for part in adapter.module.modules())
    assert torch.equal(torch.get_rng_state(), start)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_changes_nothing(mode: Any) -> None:
    adapter, batch = of_family(FAMILIES[0])
    with mode():
        found = dict(columns_of(denoiser_statistics(adapter, batch)))
        assert not torch.is_grad_enabled()
    for name, values in columns_of(denoiser_statistics(adapter, batch)):
        torch.testing.assert_close(values, found[name], rtol=1e-12, atol=1e-12)


def test_a_pass_that_is_not_finite_changes_no_other() -> None:
    adapter, batch = of_family(FAMILIES[0])
    alone = dict(columns_of(denoiser_statistics(adapter, map_tensors(lambda t: t[:1], batch))))
    batch["x"][2] = math.nan
    for name, values in columns_of(denoiser_statistics(adapter, batch)):
        torch.testing.assert_close(values[:1], alone[name], rtol=1e-9, atol=1e-12)
        assert values[[0, 1, 3]].isfinite().all()
    assert not denoiser_statistics(adapter, batch).energies["t=1/band"][2].isfinite().any()


def test_two_threads_see_their_own_passes() -> None:
    adapter, batch = of_family(FAMILIES[0], 6)
    halves = list(pieces(batch, 3))
    expected = [dict(columns_of(denoiser_statistics(adapter, half))) for half in halves]
    found: dict[int, dict[str, Tensor]] = {}

    def work(index: int) -> None:
        for _ in range(3):
            found[index] = dict(columns_of(denoiser_statistics(adapter, halves[index])))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, columns in enumerate(expected):
        for name, values in columns.items():
            torch.testing.assert_close(found[index][name], values, rtol=1e-12, atol=1e-12)


# Bands and lags


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (16, 24), (5, 7)])
def test_bands_are_those_of_the_cosine_transform(height: int, width: int) -> None:
    r = torch.randn(2, 3, height, width, dtype=torch.float64)
    found = band_energies(r)
    torch.testing.assert_close(found.sum(1), r.square().flatten(1).sum(1))
    transformed = fft.dctn(r.numpy(), axes=(2, 3), norm="ortho") ** 2
    is_small = min(height, width) < 16
    edges = [0, 0.5, 1.5, 2.5, 4, 6, 99] if is_small else [0, 2, 4, 7, 11, 16, 23, 99]
    scale = 8 if is_small else 32
    expected = torch.zeros(2, len(edges) - 1, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            radius = scale * math.hypot(i / height, j / width)
            band = max(k for k, edge in enumerate(edges) if edge <= radius)
            expected[:, band] += torch.from_numpy(transformed[:, :, i, j].sum(1))
    torch.testing.assert_close(found, expected)


def test_cosines_are_those_of_shifted_residuals() -> None:
    r = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    found = lag_cosines(r)
    one, other = r[:, :, 2:, 2:].flatten(1), r[:, :, :-2, :-2].flatten(1)
    lengths = one.norm(dim=1) * other.norm(dim=1)
    torch.testing.assert_close(found[:, 5], (one * other).sum(1) / lengths)
    torch.testing.assert_close(lag_cosines(torch.ones(1, 1, 4, 4)), torch.ones(1, 6))
    assert torch.equal(lag_cosines(torch.zeros(1, 1, 4, 4)), torch.zeros(1, 6))


# Levels


def test_levels_are_chosen_by_noise_to_signal() -> None:
    linear = om.NoiseSchedule.of(FAMILIES[0].scheduler)
    assert [linear.nearest(ratio) for ratio in (0.015, 0.33, 3.4)] == [1, 96, 498]
    flow = om.NoiseSchedule.flow(convention="noise_minus_data")
    assert float(flow.sigma[flow.nearest(1.0)]) == pytest.approx(0.5)


LEVELS: dict[str, tuple[int, Any, list[str]]] = {
    "pixels": (3, 2, ["t=1", "t=498"]),
    "latents": (4, 2, ["t=96", "t=498"]),
    "three": (3, 3, ["t=1", "t=96", "t=498"]),
    "one's own": (3, [0.33], ["t=96"]),
    "the same twice": (3, [0.33, 0.3301], ["t=96"]),
}


@pytest.mark.parametrize("name", LEVELS)
def test_two_levels_by_default_and_latents_start_higher(name: str) -> None:
    channels, ratios, levels = LEVELS[name]
    network = Function(lambda m, x, t: m.net(x), net=nn.Conv2d(channels, channels, 1))
    adapter = om.DenoisingBound(network, FAMILIES[0].scheduler, ratios=ratios)
    assert [level for level, _ in adapter.residuals(torch.rand(2, channels, 8, 8))] == levels


def test_levels_without_signal_or_noise_are_never_taken() -> None:
    ends = om.NoiseSchedule.variance_preserving(torch.tensor([1.0, 0.5, 0.0]))
    assert [ends.nearest(ratio) for ratio in (1e-9, 1.0, 1e9)] == [1, 1, 1]
    nothing = om.NoiseSchedule.variance_preserving(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="a level with both"):
        nothing.nearest(1.0)


# Refusals


def twice() -> nn.Module:
    layer = nn.Conv2d(2, 2, 1)
    return Function(lambda m, x, t: m.layer(m.layer(x)), layer=layer)


def random() -> nn.Module:
    return Function(lambda m, x, t: m.layer(x), layer=Noisy(2, 2, 1))


def beside() -> nn.Module:
    """What the last layer gives is thrown away."""
    first, last = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
    return Function(lambda m, x, t: (m.first(x), m.last(x))[0], first=first, last=last)


def without_gradients() -> nn.Module:
    return Function(lambda m, x, t: m.layer(x).detach(), layer=nn.Conv2d(2, 2, 1))


def grouped() -> nn.Module:
    return Function(lambda m, x, t: m.layer(x), layer=nn.Conv2d(2, 2, 1, groups=2))


class Noisy(nn.Conv2d):
    """Gives another output each time."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + self.calls


def functional() -> nn.Module:
    return Function(lambda m, x, t: m.scale * x, scale=torch.ones(2, 1, 1))


class Squashed(nn.Conv2d):
    """Does more than its linear map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Scaled(nn.Linear):
    """Likewise, by a number."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Own(nn.Module):
    """A convolution without what nn.Conv2d says of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


def ending(layer: nn.Module) -> nn.Module:
    return Function(lambda m, x, t: m.layer(x), layer=layer)


def two_heads() -> nn.Module:
    """Of which the second, a learned variance, is in no residual."""
    heads = {name: nn.Conv2d(2, 2, 1) for name in ("mean", "variance")}
    return Function(lambda m, x, t: torch.cat([m.mean(x), m.variance(x)], 1), **heads)


def dropping() -> nn.Module:
    layer = nn.Conv2d(2, 2, 1)
    return Function(lambda m, x, t: m.layer(F.dropout(x, 0.5)), layer=layer)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "more than a map": (lambda: ending(Squashed(2, 2, 1)), "more than its weight times"),
    "a number more": (lambda: ending(Scaled(8, 8)), "more than its weight times"),
    "one's own": (lambda: ending(Own()), "no plain convolution or linear map"),
    "two heads": (two_heads, "residual that does not come from it"),
    "random": (dropping, "the same terms each time"),
    "called twice": (twice, "got 2 calls"),
    "another output each time": (random, "more than its weight times its input"),
    "thrown away": (beside, "residual that"),
    "cut off": (without_gradients, "computed without gradients"),
    "groups": (grouped, "groups to be 1, got 2"),
    "no module": (functional, "got none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_last_layer_that_tells_nothing_is_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    network = make()
    adapter = om.DenoisingBound(network, PRODUCTS)
    with pytest.raises(ValueError, match=message):
        denoiser_statistics(adapter, torch.rand(3, 2, 8, 8))
    assert all(not part._forward_hooks for part in network.modules())
    assert torch.is_grad_enabled()


def test_what_has_no_residuals_is_refused() -> None:
    adapter = om.LogLikelihood(om.models.Glow(channels=1, size=4, levels=1, steps=1, hidden=4))
    with pytest.raises(ValueError, match="Expected a denoiser"):
        denoiser_statistics(adapter, torch.rand(3, 1, 4, 4))
    with pytest.raises(ValueError, match="Expected samples, got a tensor"):
        denoiser_statistics(adapter, torch.rand(0, 1, 4, 4))


def test_what_hooks_of_the_user_make_of_the_last_layer_is_refused() -> None:
    """The derivative by what they give is none of the layer's."""
    layer = nn.Conv2d(2, 2, 1)
    network = Function(lambda m, x, t: m.layer(x), layer=layer)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="more than its weight times its input"):
        denoiser_statistics(om.DenoisingBound(network, PRODUCTS), torch.rand(3, 2, 8, 8))


def test_first_use_gives_what_later_ones_give() -> None:
    adapter, batch = of_family(FAMILIES[0])
    first, later = (dict(columns_of(denoiser_statistics(adapter, batch))) for _ in range(2))
    for name, values in first.items():
        torch.testing.assert_close(values, later[name], rtol=1e-12, atol=1e-12)


def test_a_hook_that_comes_after_first_use_is_refused_too() -> None:
    network = ending(nn.Conv2d(2, 2, 1))
    adapter, x = om.DenoisingBound(network, PRODUCTS), torch.rand(3, 2, 8, 8)
    denoiser_statistics(adapter, x)
    network.layer.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="more than its weight times its input"):
        denoiser_statistics(adapter, x)


def test_a_last_layer_that_is_wrapped_or_replaced_is_found_again() -> None:
    network = ending(nn.Conv2d(2, 2, 1)).double()
    adapter = om.DenoisingBound(network, PRODUCTS)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    denoiser_statistics(adapter, x)
    network.layer = nn.Sequential(network.layer, nn.Conv2d(2, 2, 3, padding=1)).double()
    found = denoiser_statistics(adapter, x).output_layer
    for name, expected in differentiated(adapter, x, network.layer[1].weight, 1).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=0)


def test_frames_of_a_sample_are_its_own() -> None:
    """A convolution that sees k rows a sample, as a video's."""

    def forward(m: Any, x: Tensor, t: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(0, 1)
        return m.layer(rows).unflatten(0, (len(x), -1)).transpose(1, 2)

    layer = nn.Conv2d(2, 2, 3, padding=1).double()
    adapter = om.DenoisingBound(Function(forward, layer=layer), PRODUCTS)
    x = torch.randn(3, 2, 4, 6, 6, dtype=torch.float64)
    found = denoiser_statistics(adapter, x).output_layer
    assert {tuple(values.shape) for values in found.values()} == {(3, 2)}
    for name, expected in differentiated(adapter, x, layer.weight, 1).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=0)
    for name, values in denoiser_statistics(adapter, x[1:2]).output_layer.items():
        torch.testing.assert_close(values, found[name][1:2], rtol=1e-9, atol=0)


def test_samples_that_mix_at_one_level_alone_are_measured_alone() -> None:
    def forward(m: Any, x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = m.layer(x)
        return y - y.mean(0, keepdim=True) if int(t[0]) > 500 else y

    network = Function(forward, layer=nn.Conv2d(2, 2, 1).double())
    adapter, x = om.DenoisingBound(network, PRODUCTS), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    together = dict(columns_of(denoiser_statistics(adapter, x)))
    for name, values in columns_of(denoiser_statistics(adapter, x[:1])):
        torch.testing.assert_close(together[name][:1], values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_residuals_of_half_precision_are_summed_in_single(dtype: torch.dtype) -> None:
    network = ending(nn.Conv2d(3, 3, 3, padding=1)).to(dtype)
    adapter = om.DenoisingBound(network, PRODUCTS, prediction_type="sample")
    x = torch.full((2, 3, 64, 64), 9.0, dtype=dtype)
    for _, values in columns_of(denoiser_statistics(adapter, x)):
        assert values.dtype == torch.float32
        assert values.isfinite().all()


class Writing(nn.Module):
    """Writes into its condition."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor, t: Tensor, scale: Tensor) -> Tensor:
        scale += 1
        return self.layer(x * scale)  # type: ignore[no-any-return]


def test_what_a_network_writes_into_its_condition_is_of_one_level() -> None:
    def bound(ratios: Any) -> om.DenoisingBound:
        condition = lambda batch: {"scale": batch[1]}  # noqa: E731
        return om.DenoisingBound(network, PRODUCTS, ratios=ratios, condition=condition)

    network, given = Writing(), torch.zeros(3, 1, 1, 1)
    batch = torch.rand(3, 2, 8, 8), given
    both, alone = (dict(columns_of(denoiser_statistics(bound(r), batch))) for r in (2, [3.4]))
    for name, values in alone.items():
        torch.testing.assert_close(both[name], values)
    assert not given.any()


class Labelled(nn.Module):
    """Adds what it knows of a label to every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.of_label, self.layer = nn.Embedding(11, 2), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        told: Tensor = self.of_label(labels)[..., None, None]
        return self.layer(x + told)  # type: ignore[no-any-return]


def labelled(
    network: nn.Module | None = None, *, null: bool = True, **options: Any
) -> om.DenoisingBound:
    nothing = {"null_condition": lambda batch: {"labels": torch.full_like(batch[1], 10)}}
    return om.DenoisingBound(
        network or Labelled().double(),
        PRODUCTS,
        condition=lambda batch: {"labels": batch[1]},
        **(nothing if null else {}) | options,
    )


def test_a_null_condition_adds_a_pass_that_shows_by_how_much_the_own_one_helps() -> None:
    bound, x = labelled(), torch.rand(3, 2, 8, 8, dtype=torch.float64)
    labels = torch.tensor([1, 2, 10])
    found = {name: value.detach() for name, value in bound.residuals((x, labels))}
    *levels, last = found
    assert last == f"{levels[1]}/null"
    null = dict(bound.residuals((x, torch.full_like(labels, 10))))
    torch.testing.assert_close(found[last], null[levels[1]].detach())
    plain, checked = (
        denoiser_statistics(b, (x, labels)) for b in (labelled(bound.module, null=False), bound)
    )
    half = {k: found[k].square().flatten(1).sum(1) / 2 for k in (last, levels[1])}
    assert list(checked.condition) == [levels[1]]
    torch.testing.assert_close(checked.condition[levels[1]], half[last] - half[levels[1]])
    assert checked.condition[levels[1]][:2].abs().min() > 0
    assert checked.condition[levels[1]][2] == 0  # it was told of none already
    assert not plain.condition
    columns = dict(columns_of(checked))
    assert all(torch.equal(columns[name], values) for name, values in columns_of(plain))


def test_a_wrong_label_is_found_by_how_little_it_helps() -> None:
    """Samples of a label are about its value: both labels' samples are as likely with their own."""
    network = Labelled().double()
    with torch.no_grad():
        network.layer.weight.zero_()
        network.layer.bias.zero_()
        network.of_label.weight.zero_()
        network.of_label.weight[1:3] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        network.layer.weight[:, :, 1, 1] = torch.eye(2)
    bound = labelled(network, prediction_type="sample", ratios=[3.4])
    labels = torch.arange(400) % 2 + 1
    means = network.of_label(labels).detach()[..., None, None]
    x = means + torch.randn(400, 2, 8, 8, dtype=torch.float64)
    detector = om.Detector(bound, explain=0).fit([(x[:300], labels[:300])], progress=False)
    assert [part.kind for part in detector.fitted.joined.parts][-1] == "condition"
    right = detector.score((x[300:], labels[300:]))
    wrong = detector.score((x[300:], 3 - labels[300:]))
    assert (right.p_value <= 0.05).double().mean() < 0.15
    assert (wrong.p_value <= 0.01).all()
    [name] = [name for name in right.layers if name.startswith("condition/")]
    assert (wrong.layers[name] > right.layers[name].max()).all()


def test_a_check_of_the_condition_needs_a_null_one() -> None:
    batch = torch.rand(60, 2, 8, 8, dtype=torch.float64), torch.ones(60, dtype=torch.long)
    detector = om.Detector(labelled(null=False), parts=["condition"])
    with pytest.raises(ValueError, match="with a null condition for parts of 'condition'"):
        detector.fit([batch], progress=False)


def at_once(bound: om.Adapter) -> bool | None:
    """Whether all levels of a bound are passed at once, after a first use."""
    found: bool | None = denoising._known[bound].at_once
    return found


@every_family
def test_levels_at_once_are_as_they_are_one_by_one(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound, batch = of_family(family)
    with monkeypatch.context() as patched:
        patched.setattr(denoising, "_AT_ONCE", 0)  # no batch is small: level by level
        by_level = dict(columns_of(denoiser_statistics(bound, batch)))
    first = dict(columns_of(denoiser_statistics(bound, batch)))
    assert at_once(bound)
    denoiser_statistics(bound, batch)  # which may measure samples alone once more
    denoiser_statistics(bound, batch)
    calls: list[int] = []
    with counting(bound.module, calls):
        later = dict(columns_of(denoiser_statistics(bound, batch)))
    assert len(calls) in (1, 3)
    assert by_level.keys() == first.keys() == later.keys()
    for name, values in later.items():
        assert torch.equal(values, first[name])  # as after a restart
        largest = float(by_level[name].abs().max())
        torch.testing.assert_close(values, by_level[name], rtol=1e-9, atol=1e-12 * largest)


@contextmanager
def counting(module: nn.Module, calls: list[int]) -> Iterator[None]:
    """How often a module or a view of it is called in a block."""
    kind, original = type(module), type(module).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    kind.forward = counted  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        kind.forward = original  # type: ignore[method-assign]


def test_a_null_condition_is_passed_with_the_levels() -> None:
    bound, x = labelled(), torch.rand(3, 2, 8, 8, dtype=torch.float64)
    batch, calls = (x, torch.tensor([1, 2, 10])), list[int]()
    first = denoiser_statistics(bound, batch)
    with counting(bound.module, calls):
        second = denoiser_statistics(bound, batch)
    assert len(calls) == 1
    for name, values in first.condition.items():
        torch.testing.assert_close(second.condition[name], values)


@pytest.mark.parametrize("count", [1, 3])
def test_a_network_of_one_time_a_batch_is_passed_level_by_level(count: int) -> None:
    def forward(m: Any, x: Tensor, t: Tensor) -> Tensor:
        return m.layer(x * (1 + t[0] / 1000))  # type: ignore[no-any-return]

    network = Function(forward, layer=nn.Conv2d(2, 2, 1).double())
    bound, x = om.DenoisingBound(network, PRODUCTS), torch.rand(count, 2, 8, 8, dtype=torch.float64)
    first = dict(columns_of(denoiser_statistics(bound, x)))
    assert at_once(bound) is False
    for name, values in columns_of(denoiser_statistics(bound, x)):
        assert torch.equal(values, first[name])


def test_large_batches_are_passed_level_by_level() -> None:
    """So that a score takes the memory of a pass."""
    bound = of_layer(nn.Conv2d(3, 2, 1))
    small, large = (torch.rand(n, 2, 16, 16, dtype=torch.float64) for n in (2, 40))
    denoiser_statistics(bound, small)
    assert at_once(bound)
    calls: list[int] = []
    with counting(bound.module, calls):
        denoiser_statistics(bound, large)
    assert len(calls) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["module", "wrapper"])
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # by the compiler, of itself
def test_compiled_denoisers_are_measured_like_others(compiled: str) -> None:
    """Warmed, so that what the compiler keeps of a call would be used."""
    family = FAMILIES[0]
    network, batch = family.network().eval(), family.batch(3)
    perturbed(network)
    expected = dict(columns_of(denoiser_statistics(family.adapter(network), batch)))
    if compiled == "module":
        network.compile(backend="eager")
    else:
        network = torch.compile(network, backend="eager")  # type: ignore[assignment]
    bound = family.adapter(network)
    with torch.no_grad():
        list(bound.residuals(batch))
    for _ in range(2):
        found = dict(columns_of(denoiser_statistics(bound, batch)))
        assert [name.replace("_orig_mod.", "") for name in found] == list(expected)
        for values, others in zip(found.values(), expected.values(), strict=True):
            torch.testing.assert_close(values, others, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(
    "x86" not in torch.backends.quantized.supported_engines, reason="PyTorch without int8"
)
@pytest.mark.filterwarnings("ignore:.*deprecated")
@every_family
def test_int8_denoisers_are_measured_as_what_was_quantised(family: Family) -> None:
    """Also those whose last layer is quantised, up to what eight bits round."""
    network, batch = family.network().eval(), family.batch(3)
    perturbed(network)
    quantised = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, torch.qint8)
    expected = dict(columns_of(denoiser_statistics(family.adapter(network), batch)))
    found = dict(columns_of(denoiser_statistics(family.adapter(quantised), batch)))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        if "/lag" not in name:  # of sums of squares, by sample
            sums, others = (each.reshape(3, -1).sum(1) for each in (values, expected[name]))
            torch.testing.assert_close(sums, others, rtol=0.2, atol=1e-6)
