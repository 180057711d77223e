"""One page of what the library costs, made of what `make bench` measured.

Nothing is measured here: the page says what the results hold, and names those that are not there.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.cost import sections
from benchmarks.cost.sections import Figure, Report
from benchmarks.harness import pages
from benchmarks.harness.pages import table

INTRODUCTION = """\
# Performance

What the library costs in time and memory. `make bench` measures it and writes this page;
`python -m benchmarks.cost.performance` writes it again from what was measured, in
`benchmarks/results`, as `make test-foreign` does once it has measured models of other packages.
What a network costs depends on its sizes, so weights are random. A ratio is of runs in one process,
one just before or after the other, so that other work on the machine counts little in it; it does
show in milliseconds and quantiles."""


@dataclass(frozen=True)
class Part:
    """Of the page.

    Attributes:
        name: The file of its results, without ending.
        title: Its heading.
        options: The benchmark below `benchmarks`, and the options of its command.
        figures: Its rows of the table of main figures.
        section: What its results say in full, block by block.
    """

    name: str
    title: str
    options: str
    figures: Callable[[Report], list[Figure]]
    section: Callable[[Report], list[str]]

    @property
    def command(self) -> str:
        return f"python -m benchmarks.{self.options} --json benchmarks/results/{self.name}.json"


PARTS = [
    Part(
        "gradient_norms",
        "Gradient norms",
        "cost.gradient_norms --figure docs/gradient-norms-cost.png",
        sections.norms_figures,
        sections.norms_section,
    ),
    Part(
        "foreign",
        "Models of other packages",
        "cost.foreign",
        sections.foreign_figures,
        sections.foreign_section,
    ),
    Part(
        "factor_forms",
        "Choice of form",
        "cost.factor_forms",
        sections.forms_figures,
        sections.forms_section,
    ),
    Part(
        "drift",
        "Drift",
        "drift.e_detector --figure docs/drift.png",
        sections.drift_figures,
        sections.drift_section,
    ),
    Part(
        "lightning",
        "Lightning",
        "integrations.lightning",
        sections.lightning_figures,
        sections.lightning_section,
    ),
    Part(
        "transformers",
        "The Hugging Face Trainer",
        "integrations.transformers",
        sections.transformers_figures,
        sections.transformers_section,
    ),
    Part(
        "diffusers_latency",
        "diffusers",
        "integrations.diffusers --part latency",
        sections.diffusers_figures,
        sections.diffusers_section,
    ),
    Part(
        "real_sizes",
        "Denoisers of real sizes",
        "integrations.real_sizes --scale 0.1 --model 'SD 1.5' --rounds 3",
        sections.real_sizes_figures,
        sections.real_sizes_section,
    ),
]


def rendered(results: Path) -> str:
    """The page of the results in a folder."""
    files = {part: results / f"{part.name}.json" for part in PARTS}
    found = {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}
    lacking = [f"- {part.title}: `{part.command}`" for part in PARTS if part not in found]
    blocks = [INTRODUCTION]
    if lacking:
        blocks += ["Not measured yet:", "\n".join(lacking)]
    if found:
        blocks += [*overview(found), *claimed(found)]
    for part, report in found.items():
        blocks += [f"## {part.title}", *part.section(report)]
    return "\n\n".join(blocks) + "\n"


def overview(found: dict[Part, Report]) -> list[str]:
    machines = [
        (part.title, pages.described(report["machine"]), f"`{part.command}`")
        for part, report in found.items()
    ]
    figures = [(part.title, *row) for part, report in found.items() for row in part.figures(report)]
    return [
        table(["part", "measured on", "by"], machines),
        "## Main figures",
        table(["part", "what", "ours", "beside it"], figures),
    ]


def claimed(found: dict[Part, Report]) -> list[str]:
    """Those that are missed before all."""
    every = [
        claim | {"claim": f"{part.title}: {claim['claim']}"}
        for part, report in found.items()
        for claim in report["claims"]
    ]
    return pages.judged("## Claims", every)


def main(
    results: Annotated[Path, typer.Option(help="Folder of what was measured.")] = Path(
        "benchmarks/results"
    ),
    page: Annotated[Path, typer.Option(help="What to write.")] = Path("docs/performance.md"),
) -> None:
    page.write_text(rendered(results))


if __name__ == "__main__":
    typer.run(main)
