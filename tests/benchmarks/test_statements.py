"""What answers the paper's statements: the forms of gradients, steps, counts, and the page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ood_monitor as om
from benchmarks.detection import (
    answers,
    datasets,
    paper_page,
    protocol,
    reserved,
    statements,
    statements_fisher,
    statements_norms,
    statements_steps,
    zoo,
)
from ood_monitor.densities.measurements import Measurements

ROOT = Path(__file__).parents[2]

#: Modules by which something was chosen, or is.
CHOOSERS = ("chosen_by", "densities", "one_level", "noise_levels")


def gradients(samples: int, parameters: int) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    scales = torch.logspace(-1, 1, parameters, dtype=torch.float64)
    return scales * torch.randn(samples, parameters, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("samples", "parameters"), [(30, 12), (12, 30)])
def test_the_metric_by_the_gram_matrix_is_that_by_the_fisher_matrix(
    samples: int, parameters: int
) -> None:
    fit, rest = gradients(samples, parameters), gradients(7, parameters)
    fisher = fit.T @ fit / samples
    found = statements_fisher.woodbury(fit @ fit.T, rest @ fit.T, rest.square().sum(1), parameters)
    for times, form in found.items():
        mean = fisher.trace() / min(samples, parameters)
        damped = fisher + times * mean * torch.eye(parameters, dtype=torch.float64)
        direct = (rest * torch.linalg.solve(damped, rest.T).T).sum(1)
        torch.testing.assert_close(form, direct, rtol=1e-8, atol=0)


def test_forms_add_up_over_layers() -> None:
    fit, rest = gradients(20, 9), gradients(5, 9)
    forms = statements_fisher.Forms(20)
    for columns in (slice(0, 4), slice(4, 9)):
        forms.add(torch.cat([fit, rest])[:, columns].float())
    torch.testing.assert_close(forms.norm, rest.square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(forms.gram, fit @ fit.T, rtol=1e-4, atol=1e-4)
    assert len(forms.by_layer["norms"]) == 2
    pairs = [(i, j) for i in range(20) for j in range(20) if i != j]
    on_diagonal = sum(float((fit[i] * fit[j]).square().sum()) for i, j in pairs)
    assert forms.mass["diagonal"] == pytest.approx(on_diagonal, rel=1e-4)
    in_blocks = sum(
        float((fit[i, at] @ fit[j, at]) ** 2) for i, j in pairs for at in (slice(0, 4), slice(4, 9))
    )
    assert forms.mass["blocks"] == pytest.approx(in_blocks, rel=1e-4)


class Line(om.Adapter):
    """A likelihood linear in its weights."""

    def __init__(self) -> None:
        self.module = nn.Linear(3, 1, bias=False).double()

    def log_likelihood(self, batch: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield "log_likelihood", self.module(batch)[:, 0]


def test_a_step_changes_its_sample_by_its_norm_and_others_by_their_product() -> None:
    adapter, rate = Line(), 0.1
    sample, others = torch.tensor([[1.0, 2.0, 2.0]]).double(), torch.eye(3).double()
    others[1] *= -1
    parameters = list(adapter.module.parameters())
    before = statements_steps.total(adapter, others).detach()
    weights = parameters[0].detach().clone()
    own, size, signed = statements_steps.stepped(adapter, parameters, sample, others, before, rate)
    assert own == pytest.approx(rate * 9)
    assert size == pytest.approx(rate * 5 / 3)
    assert signed == pytest.approx(rate * (1 - 2 + 2) / 3)
    assert torch.equal(parameters[0], weights)


def test_moved_parameters_are_put_back_after_a_failure() -> None:
    parameter = nn.Parameter(torch.ones(3))

    def broken() -> None:
        with statements_steps.moved([parameter], [torch.ones(3)]):
            assert torch.equal(parameter, torch.full((3,), 2.0))
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        broken()
    assert torch.equal(parameter, torch.ones(3))


def found(**factors: list[float]) -> dict[str, Measurements]:
    """Norms of four layers of sets, times what is given by layer."""
    generator = np.random.default_rng(0)
    layers = tuple(f"log_likelihood/{name}.weight" for name in "abcd")
    return {
        name: Measurements.of_norms(
            ("log_likelihood",),
            generator.normal(size=(200, 1)),
            layers,
            np.exp(generator.normal(size=(200, 4))) * np.array(factor),
        )
        for name, factor in factors.items()
    }


def test_layers_that_are_larger_are_counted_and_told_by_how_much() -> None:
    # A median of 200 logs of deviation 1 is off by .09: 3 is 8 of the difference's deviations away.
    row = statements_norms.larger(found(fit=[1.0] * 4, test=[1.0] * 4, odd=[3.0, 3.0, 3.0, 0.3]))
    assert row["median"] == {"odd": 0.75}
    assert row["mean of log"] == {"odd": 0.75}
    assert 2 < row["times"]["odd"] < 4


def test_the_layer_that_tells_is_found_and_so_is_how_many_suffice() -> None:
    row = statements_norms.layers(found(fit=[1.0] * 4, test=[1.0] * 4, odd=[1.0, 1.0, 1e4, 1.0]))
    assert row["best"] == "c.weight"
    assert row["best alone"] > 0.99
    assert row["median alone"] < 0.7
    assert row["carry"] == 0.25
    assert list(row["evenly spaced"]) == ["1", "2", "4"]
    assert row["best by hindsight"]["1"] == row["best alone"]


def test_pairs_are_better_equal_or_worse() -> None:
    def row(method: str, **aurocs: float) -> dict[str, Any]:
        return {
            "part": "table",
            "on": "a",
            "model": "b",
            "group": 1,
            "method": method,
            "auroc": aurocs,
        }

    rows = [row("x", one=0.9, two=0.7, three=0.504), row("y", one=0.8, two=0.8, three=0.5)]
    assert answers.counts(rows[:1], rows[1:]) == (1, 1, 1)


def test_a_part_that_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "part.json"
    assert statements.kept(file, lambda: [{"part": "x"}]) == [{"part": "x"}]
    assert statements.kept(file, lambda: pytest.fail("measured twice")) == [{"part": "x"}]


# The page.


def test_the_committed_page_is_of_the_committed_results() -> None:
    """Where it is not, `python -m benchmarks.detection.paper_page` writes it anew."""
    page = paper_page.rendered(ROOT / "benchmarks" / "results")
    assert (ROOT / "docs" / "paper.md").read_text() == page


def test_every_statement_has_its_row_and_all_but_its_data_are_answered() -> None:
    """Where results are there: three of the paper's sets are not."""
    assert list(paper_page.STATEMENTS) == list(range(1, 31))
    results = answers.loaded(ROOT / "benchmarks" / "results")
    there = {n: s for n, s in paper_page.STATEMENTS.items() if set(s.needs) <= results.keys()}
    verdicts = {n: paper_page.answered(it, results).verdict for n, it in there.items()}
    assert [n for n, it in verdicts.items() if it.startswith(answers.COULD_NOT)] == [30]


def test_the_page_is_read_in_minutes() -> None:
    text = (ROOT / "docs" / "paper.md").read_text().replace("|", " ")
    assert len(text.split()) <= 1_500


def test_a_statement_whose_results_are_missing_says_which(tmp_path: Path) -> None:
    page = paper_page.rendered(tmp_path)
    for statement in paper_page.STATEMENTS.values():
        names = ", ".join(f"`{name}`" for name in statement.needs)
        assert not names or f"could not be run, because {names} is not measured yet" in page


@pytest.mark.parametrize(
    ("share", "verdict"),
    [
        *((1.0, "holds"), (0.9, "holds"), (0.89, "holds in part"), (0.25, "holds in part")),
        *((0.24, "does not hold here"), (0.0, "does not hold here")),
    ],
)
def test_a_verdict_goes_by_the_share_of_cases(share: float, verdict: str) -> None:
    assert answers.of_share(share) == verdict


# What is held back.


def test_reserved_classes_are_those_that_their_models_never_see() -> None:
    for classes in datasets.RESERVED.values():
        assert classes.of in datasets.SOURCES
        assert not set(classes.known) & set(classes.foreign)
        assert classes.of not in zoo.TRAINED_ON


@pytest.mark.parametrize("name", CHOOSERS)
def test_nothing_is_chosen_by_what_is_reserved(name: str) -> None:
    """Which takes the classes of a set: a module that reads no labels cannot tell them apart."""
    code = (ROOT / "benchmarks" / "detection" / f"{name}.py").read_text()
    assert "RESERVED" not in code
    assert "labels(" not in code
    assert "_labels" not in code


def test_a_reserved_case_holds_no_foreign_class_and_no_image_twice(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(256, size=(2600, 28, 28), dtype=np.uint8)
    labels = np.arange(2600) % 26
    images[:, 0, 0] = labels  # by which an image is known
    file = tmp_path / f"{datasets.SOURCES['EMNIST letters'].file}.npz"
    np.savez(file, test=images, test_labels=labels.astype(np.uint8))
    name = "EMNIST letters N to Z"
    case = reserved.case(tmp_path, name)
    classes = {of: set(each[:, 0, 2, 2].tolist()) for of, each in case.images.items()}
    assert classes.pop(name) == set(range(13, 26))
    assert all(each == set(range(13)) for each in classes.values())
    assert [len(each) for each in case.images.values()] == [100, 400, 400, 400, 300]
    protocol.check_disjoint(case.images)
