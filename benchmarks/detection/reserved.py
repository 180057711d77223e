"""Sets by which nothing was chosen: models of some classes of a set are shown its other classes.

`RESERVED` of `benchmarks.detection.datasets` names the classes, which no choice may look at. The
methods have their defaults, which were fixed before any of these models was trained; figures are
told of all of them. The models are small ones of the zoo, trained on those test images that
are of known classes and that neither fit, calibrate nor test: there are no others.

    python -m benchmarks.detection.reserved --data-dir FOLDER --train runs/reserved
    python -m benchmarks.detection.reserved --data-dir FOLDER \\
        --json benchmarks/results/reserved.json
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.detection import cases, datasets, protocol, trained
from benchmarks.detection.cases import Case
from benchmarks.detection.datasets import RESERVED
from benchmarks.detection.protocol import Sizes

#: What models are trained on, and their share of a model's steps: fewer of fewer images.
KNOWN = {
    "EMNIST letters N to Z": ("EMNIST letters A to M", 0.2),
    "GTSRB classes 30 to 42": ("GTSRB classes 0 to 29", 0.1),
}

SIZES = Sizes(fit=400, calibration=400, test=400, ood=300)


def case(directory: Path, name: str) -> Case:
    """Of one of the reserved sets, whose known images are split at random."""
    reserved = RESERVED[name]
    images = datasets.harmonised(datasets.read(directory, reserved.of, "test"))
    labels = datasets.labels(directory, reserved.of, "test")
    known, foreign = (
        images[torch.from_numpy(np.isin(labels, list(classes)))]
        for classes in (reserved.known, reserved.foreign)
    )
    known = protocol.unlike(trained.drawn(known, len(known)), foreign)
    held_out = SIZES.fit + SIZES.calibration
    test, rest, seen = known.tensor_split([SIZES.test, SIZES.test + held_out])
    seen = protocol.unlike(seen, test, rest)
    sets = protocol.split(seen, rest, test, {name: foreign}, SIZES)
    of, share = KNOWN[name]
    return Case(of, {"train": seen, **sets}, share)


def main(
    quick: cases.Quick = False,
    data_dir: Annotated[Path, typer.Option(help="Folder of images.")] = Path("data"),
    of: Annotated[list[str] | None, typer.Option(help="A reserved set; all if none.")] = None,
    model: cases.Models = None,
    train: cases.Training = None,
    folder: cases.Folder = Path("runs/reserved/rows"),
    json: cases.Output = None,
) -> None:
    if quick:
        cases.run_quick(json)
        return
    names = of or list(RESERVED)
    datasets.require(data_dir, {RESERVED[name].of for name in names})
    found = [case(data_dir, name) for name in names]
    cases.run(found, model or list(cases.of_zoo()), train, folder, json)


if __name__ == "__main__":
    typer.run(main)
