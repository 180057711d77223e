"""Names that stay when layers are wrapped, on a stand-in for PEFT's module around a layer."""

import pytest
import torch
from torch import Tensor, nn

from ood_monitor.gradients.layers import selection
from ood_monitor.modules import Names, Part, part_of, tuners_in, weights_in_use
from ood_monitor.saving import digest


class Tuned(nn.Module):
    """As PEFT's: a layer, and weights beside it by the names of what is on."""

    adapter_layer_names = ("lora_A",)

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.lora_A = layer, nn.ModuleDict({"x": nn.Linear(2, 2)})
        self.active_adapters, self.scaling = ["x"], {"x": 1.0}
        self.disable_adapters = self.merged = False

    def forward(self, h: Tensor) -> Tensor:
        return self.base_layer(h) + self.scaling["x"] * self.lora_A["x"](h)  # type: ignore[no-any-return]


def model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))


def wrap(module: nn.Sequential) -> Tuned:
    module[2] = tuned = Tuned(module[2])
    return tuned


def test_a_wrapped_layer_keeps_its_name_and_a_tuner_has_none() -> None:
    module = model()
    layer = module[2]
    wrap(module)
    names = Names.of(module)
    assert names.layers("2.base_layer") == ("2",)
    assert names.layers("2.lora_A.x") == ()
    assert names.weights("2.base_layer.weight") == (Part("2.weight"),)
    assert names.weights("2.lora_A.x.weight") == ()
    assert names.weights("0.weight") == (Part("0.weight"),)
    assert part_of(module, "2") is layer


def test_patterns_mean_the_models_own_weights_where_they_match_any() -> None:
    module = model()
    wrap(module)
    chosen = selection(module, "2.*")
    assert chosen("2.weight")
    assert chosen("2.base_layer.weight")
    assert not chosen("2.lora_A.x.weight")
    assert selection(module, "*lora*")("2.lora_A.x.weight")
    assert not selection(module, None)("2.lora_A.x.weight")


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"disable_adapters": True}, True),
        ({"merged": True}, True),
        ({"active_adapters": []}, True),
        ({"scaling": {"x": 0.0}}, True),
        ({}, False),
    ],
)
def test_what_is_off_is_no_part_of_the_digest(change: dict[str, object], is_same: bool) -> None:
    module = model()
    before = digest(module)
    tuned = wrap(module)
    vars(tuned).update(change)
    assert (digest(module) == before) == is_same
    assert (tuners_in(module) == {}) == is_same
    names = [name for name, _ in weights_in_use(module)]
    assert names[:4] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (len(names) == 4) == is_same
