"""The model card of a saved detector: what it is, how to load it, what it can say of itself."""

import hashlib
import importlib.util
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCardData

from ood_monitor.adapters import ELBO, DenoisingBound, LogLikelihood, SequenceLikelihood
from ood_monitor.calibration.conformal import autocorrelation_bound, lag1_autocorrelation
from ood_monitor.calibration.diagnostics import Diagnosis
from ood_monitor.densities.parts import CHOSEN
from ood_monitor.saving.fitted import Fitted
from ood_monitor.whole_files import replace_files

__all__ = [
    "CARD",
    "FIGURE",
    "is_own",
    "model_card",
    "save_card",
    "told_conditions",
    "told_explanation",
    "told_groups",
    "told_method",
    "told_parts",
]

CARD, FIGURE = "README.md", "calibration.png"

#: Adapters that a card can write down.
_ADAPTERS = {
    f"{kind.__module__}.{kind.__qualname__}": kind
    for kind in (DenoisingBound, ELBO, LogLikelihood, SequenceLikelihood)
}

#: Arguments that decide what a score means, and are told even where they are the default.
_TOLD = ("levels", "seed")

#: What a method goes by, with the line breaks of the text that it stands in.
_NORMS = "the norms of a generative model's log-likelihood gradients, layer by\nlayer"
_FORWARD = (
    "what a generative model's forward pass says: what was expected of its\nlog-likelihood, the "
    "surprise, and each layer's expected gradient norm"
)
_SCORED_BY = {
    "gradient_norms": _NORMS,
    "forward": _FORWARD,
    "both": f"{_NORMS}, and by {_FORWARD}",
    CHOSEN: "the parts below of what a generative model makes of them",
}

_MARK = re.compile(r"\n<!-- ood-monitor card ([0-9a-f]{12}): edit freely[^\n]*-->\n\Z")


def save_card(
    directory: Path,
    fitted: Fitted,
    options: Mapping[str, Any],
    *,
    name: str = ".",
    diagnosis: Diagnosis | None = None,
    there: str | None = None,
) -> None:
    """Write the card and its figure, unless there is a README of the user's.

    Args:
        directory: Where to.
        fitted: What the detector learned.
        options: The detector's own settings.
        name: Where it will be loaded from.
        diagnosis: Of held-out data, if there is one.
        there: The README that is there already, if it is not in the directory.
    """
    path = directory / CARD
    if there is None and path.is_file():
        there = path.read_text(encoding="utf-8", errors="replace")
    if there is not None and not is_own(there):
        return
    has_figure = _save_figure(directory / FIGURE, fitted)
    text = model_card(fitted, options, name=name, diagnosis=diagnosis, has_figure=has_figure)
    replace_files({path: text.encode()})


def is_own(text: str) -> bool:
    """Whether a README is a card of :func:`model_card` that nobody has changed."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def model_card(
    fitted: Fitted,
    options: Mapping[str, Any],
    *,
    name: str = ".",
    diagnosis: Diagnosis | None = None,
    has_figure: bool = False,
) -> str:
    """The card as Markdown, with the Hub's front matter; arguments as :func:`save_card`."""
    data = ModelCardData(
        library_name="ood-monitor",
        tags=["ood-monitor", "out-of-distribution-detection", "anomaly-detection"],
        base_model=fitted.provenance.base_model,
    )
    rows = [*_facts(fitted), *_diagnostics(fitted), *_diagnosed(diagnosis)]
    figure = f"\n![Scores of the calibration samples]({FIGURE})\n" if has_figure else ""
    text = f"""---
{data.to_yaml()}
---

# Out-of-distribution detector {fitted.fingerprint}

{_introduction(fitted)}

{_watched(fitted)} The files here hold neither the model's weights nor any sample.

## Use

```python
{_loader(fitted, name)}
```

`scores = detector.score(batch)` then has `score`, `p_value` and `log_likelihood`, each of shape
(B,), and what each layer adds. {_precondition(fitted)}

## Diagnostics

| | |
|---|---|
{chr(10).join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows)}
{figure}{_problems(diagnosis)}
A p-value is exact for one sample that is exchangeable with the calibration samples. Which foreign
samples are found depends on the model and on the data, and nothing here promises it: try the
detector on such samples before you rely on it.
"""
    mark = "edit freely, a changed card is never written over"
    return f"{text}\n<!-- ood-monitor card {_digest(text)}: {mark} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _save_figure(path: Path, fitted: Fitted) -> bool:
    """Draw the calibration scores, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from ood_monitor.plots import score_histogram  # needs the extra

    scores = {"calibration": fitted.calibration.scores}
    figure = score_histogram(scores, title=f"Detector {fitted.fingerprint}")
    figure.savefig(path, dpi=100)
    return True


def _introduction(fitted: Fitted) -> str:
    return (
        f"Scores samples by {_SCORED_BY[fitted.method]}, and says with a p-value how usual such a\n"
        "score is among held-out samples of its training data. Made with ood-monitor; gradient\n"
        "norms are after [Dauncey et al., 2024](https://arxiv.org/abs/2403.01485)."
    )


def _watched(fitted: Fitted) -> str:
    base, revision = fitted.provenance.base_model, fitted.provenance.base_model_revision
    weights = f"weights of digest `{fitted.model}`, {fitted.dtype.removeprefix('torch.')}"
    if base is None:
        return f"The model is one with {weights}."
    at = f" at `{revision}`" if revision else ""
    return f"The model is [{base}](https://huggingface.co/{base}){at}: {weights}."


def _precondition(fitted: Fitted) -> str:
    shapes = " and ".join(f"`{sample}`" for sample in fitted.samples)
    takes = f"A batch holds tensors of B samples of {shapes}. " if shapes else ""
    return f"{takes}On other weights the calibration is stale, and loading warns of it."


def _facts(fitted: Fitted) -> Iterator[tuple[str, str]]:
    provenance, dropped = fitted.provenance, fitted.joined.dropped
    if terms := provenance.adapter.get("terms"):
        yield "terms of the log-likelihood", ", ".join(terms)
    if conditions := told_conditions(fitted):
        yield "conditions", conditions
    yield "layers", f"{len(fitted.layers):,}"
    reasons = ", ".join(f"{count:,} {why}" for why, count in Counter(dropped.values()).items())
    total = len(fitted.joined.all_names)
    yield "features", f"{total:,}, of which left out: {reasons or 'none'}"
    yield "method", told_method(fitted)
    yield "parts", told_parts(fitted)
    yield "explains", told_explanation(fitted)
    yield "fit samples", f"{fitted.fit_count:,}"
    yield "calibration samples", f"{len(fitted.calibration.scores):,}"
    if fitted.grouped is not None:
        yield "groups of their own", told_groups(fitted)
    if provenance.libraries:
        yield "fitted with", ", ".join(f"{k} {v}" for k, v in provenance.libraries.items())


def told_groups(fitted: Fitted) -> str:
    """How many groups a detector has, and which if the adapter told them; empty if none."""
    if fitted.grouped is None:
        return ""
    count = f"{len(fitted.grouped.large):,}"
    if not fitted.groups_of_adapter:
        return count
    return f"{count}, by size and adapters: {', '.join(fitted.grouped.large) or 'none'}"


def told_conditions(fitted: Fitted) -> str:
    """What the model was told beside samples, and of how many values; empty if nothing."""
    counts = fitted.provenance.adapter.get("conditions", {})
    return ", ".join(
        f"{name} (one value)" if count == 1 else f"{name} ({count:,} values)"
        for name, count in counts.items()
    )


def told_method(fitted: Fitted) -> str:
    """The method of a detector, and why it is that."""
    return f"{fitted.method} ({fitted.reason})" if fitted.reason else fitted.method


def told_explanation(fitted: Fitted) -> str:
    """By what a detector explains a sample, and of how many others."""
    usual = fitted.usual
    if usual is None or not usual.layers:
        return f"by place ({usual.without if usual else 'explain=0'})"
    return f"by layer and by place (from {usual.count:,} held-out samples)"


def told_parts(fitted: Fitted) -> str:
    """The parts of a detector, each with its density."""
    return ", ".join(f"{it.kind} ({type(it.density).__name__})" for it in fitted.joined.parts)


def _diagnostics(fitted: Fitted) -> Iterator[tuple[str, str]]:
    """What a fitted detector can say without data."""
    yield "smallest p-value", f"{fitted.calibration.smallest:.3g}"
    levels = (0.05, 0.5, 0.95, 0.99)
    quantiles = np.quantile(fitted.calibration.scores, levels)
    told = ", ".join(f"{level:.0%}: {q:.3g}" for level, q in zip(levels, quantiles, strict=True))
    yield "calibration scores", told
    if np.isfinite(fitted.log_likelihood).all():
        found = lag1_autocorrelation(fitted.log_likelihood)
        bound = autocorrelation_bound(len(fitted.log_likelihood))
        yield (
            "correlation of neighbours' log-likelihoods",
            f"{found:.2f} (independent samples: at most {bound:.2f})",
        )


def _diagnosed(diagnosis: Diagnosis | None) -> Iterator[tuple[str, str]]:
    """What held-out data said of the model."""
    if diagnosis is None:
        return
    distances = list(diagnosis.ks.values())
    yield "mean absolute correlation of features", f"{diagnosis.mean_correlation:.2f}"
    yield (
        "Kolmogorov-Smirnov distance of features",
        f"median {np.median(distances):.2f}, largest {max(distances):.2f}",
    )
    shared = float(np.quantile(list(diagnosis.shared_gradient.values()), 0.9))
    yield "gradient shared by all samples, 90% quantile over layers", f"{shared:.2f}"
    yield "samples of a second population", f"{diagnosis.mixed:.0%}"
    if diagnosis.noise_correlation is not None:
        yield "rank correlation under other noise", f"{diagnosis.noise_correlation:.2f}"


def _problems(diagnosis: Diagnosis | None) -> str:
    if diagnosis is None:
        return ""
    found = "\n".join(f"- {problem}" for problem in diagnosis.problems)
    return f"\nProblems that `ood_monitor.diagnose` found:\n\n{found or '- none'}\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _loader(fitted: Fitted, name: str) -> str:
    """Python that loads the detector, given what no file can hold."""
    recipe = fitted.provenance.adapter
    kind = _ADAPTERS.get(recipe.get("class", ""))
    is_given = fitted.grouped is not None and not fitted.groups_of_adapter
    groups = ", groups=groups" if is_given else ""
    given = ["groups"] if groups else []
    if kind is None:
        said = recipe.get("class", "").rsplit(".", 1)[-1] or "an adapter"
        lines = [f"    # {said}, as `adapter` in config.json says"]
        given.insert(0, "adapter")
    else:
        own, arguments = _arguments(kind, recipe["arguments"])
        lines = [f"    adapter = om.{kind.__name__}({', '.join(arguments)})"]
        given = [*own, *given]
    call = f"    return om.Detector.from_pretrained({_literal(name)}, adapter{groups})"
    # Required ones first, as Python asks for.
    given.sort(key=lambda argument: "=" in argument)
    define = f"def load_detector({', '.join(given)}):"
    return "\n".join(["import ood_monitor as om", "", "", define, *lines, call])


def _arguments(kind: type, recorded: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Arguments that the reader must give, and those of the adapter's call."""
    given: list[str] = []
    call: list[str] = []
    for name, parameter in inspect.signature(kind).parameters.items():
        required = parameter.default is parameter.empty
        value = recorded.get(name)
        if required or _is_given(value):
            given.append(name if required or parameter.default is not None else f"{name}=None")
            call.append(name if required else f"{name}={name}")
        elif isinstance(value, dict) or name not in recorded:
            continue  # what the library chooses itself
        elif name in _TOLD or value != _listed(parameter.default):
            call.append(f"{name}={_literal(value)}")
    return given, call


def _is_given(value: Any) -> bool:
    """Whether it is a function or an object of the user's, not one that the library chose."""
    said = value.get("object") if isinstance(value, dict) else None
    return said is not None and not re.fullmatch(r"ood_monitor\..*\._\w+", said)


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _listed(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default
