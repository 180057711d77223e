"""Scores by a pass that the user makes: those of scoring's own pass, or a refusal."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ood_monitor as om


def texts(seed: int, count: int = 8) -> Tensor:
    return torch.randint(1, 12, (count, 7), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 12)
    return nn.Sequential(*parts).eval()


@pytest.fixture
def detector(model: nn.Module) -> om.Detector:
    found = om.Detector(om.SequenceLikelihood(model), method="forward")
    found.fit(texts(1, 96).split(16), progress=False)
    found.score(texts(2))  # of which it is seen how a batch's rows lie
    return found


def heard(
    detector: om.Detector, given: Tensor, mode: AbstractContextManager[Any] | None = None
) -> Any:
    live = detector.live(texts(3))
    assert live is not None
    with torch.no_grad(), live.listening(), mode or nullcontext():
        logits = detector.adapter.module(given)
    live.ended(logits)
    return live


def test_a_pass_of_the_user_gives_the_scores_of_an_own_one(detector: om.Detector) -> None:
    live = heard(detector, texts(3))
    found = detector.score(texts(3), live=live)
    torch.testing.assert_close(found.score, detector.score(texts(3)).score)


def test_a_pass_that_is_none_of_scoring_is_refused(detector: om.Detector) -> None:
    with pytest.raises(ValueError, match="run on other tokens than those of the batch"):
        detector.score(texts(3), live=heard(detector, texts(4)))
    with pytest.raises(ValueError, match=r"batch that `detector.live` was given, got one of other"):
        detector.score(texts(4), live=heard(detector, texts(3)))
    mixed = torch.autocast("cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="it ran in mixed precision"):
        detector.score(texts(3), live=heard(detector, texts(3), mixed))
    with pytest.raises(ValueError, match="its logits were not told"):
        detector.score(texts(3), live=detector.live(texts(3)))
    detector.adapter.module.train()
    with pytest.raises(ValueError, match="in training mode"):
        detector.score(texts(3), live=heard(detector, texts(3)))


def test_a_call_goes_on_where_its_listener_is_taken_off_within(detector: om.Detector) -> None:
    """As where what listens is collected as garbage while the user's model runs."""
    model, live = detector.adapter.module, detector.live(texts(3))
    assert live is not None
    wanted = model(texts(3))
    listening = live.listening()

    def take_off(*_: Any) -> None:
        listening.__exit__(None, None, None)

    handle = model[1].register_forward_pre_hook(take_off)
    with torch.no_grad():
        listening.__enter__()
        torch.testing.assert_close(model(texts(3)), wanted)
    handle.remove()
    live.ended(wanted)
    torch.testing.assert_close(model(texts(3)), wanted)  # and no hook is left
    assert not any(part._forward_pre_hooks for part in model.modules())
