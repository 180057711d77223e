"""What a monitor remembers of its stream: running figures, flagged samples, and where it stands."""

import copy
import math
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, get_args

import numpy as np
import torch

from ood_monitor.alerts.alert import (
    Alert,
    AlertEvidence,
    AlertKind,
    FlaggedSample,
    LayerShare,
    Status,
    TermShare,
    TracePoint,
)
from ood_monitor.calibration.conformal import binomial_interval
from ood_monitor.calibration.scores import Scores
from ood_monitor.checks import number, whole
from ood_monitor.densities import Array
from ood_monitor.drift.change import KEPT
from ood_monitor.monitor.block_means import BlockMeans

__all__ = [
    "LARGEST_PART",
    "Episode",
    "Memory",
    "Row",
    "overall",
    "rows_of",
    "strongest_layers",
    "top_layers",
    "top_terms",
]

#: Scores of the episode that the running figures cover.
_RECENT_SCORES = 1000

#: Tested samples that a drift alert traces.
_TRACED = 200

_KEPT = ("scores", "flags", "tested", "flagged")

#: Latest samples of which it counts how many could be scored.
_RECENT_VALIDITY = 100

#: Flagged samples that an alert names, and layers.
_SAMPLES, _LAYERS = 20, 10

#: What an infinite part of a score counts as, so that means and shares of layers stay finite.
LARGEST_PART = 1e100


@dataclass(frozen=True)
class Row:
    """One sample's part of :class:`Scores`; ``layers`` is z and parts of the score, (2, L)."""

    score: float
    p_value: float
    valid: bool
    layers: Array
    id: str | None
    group: int = 0


def rows_of(scores: Scores, names: Sequence[str], ids: Sequence[Any] | None) -> Iterator[Row]:
    """The samples of scores, one by one, with layers in the order of ``names``."""
    nothing = torch.full_like(scores.score, math.nan)
    z = torch.stack([scores.z.get(name, nothing) for name in names], 1)
    parts = torch.stack([scores.layers.get(name, nothing) for name in names], 1)
    layers = torch.stack([z, parts.clamp(-LARGEST_PART, LARGEST_PART)], 1).numpy()
    called = [None] * len(layers) if ids is None else [i if i is None else str(i) for i in ids]
    groups = [0] * len(layers) if scores.group is None else scores.group.tolist()
    columns = scores.score.tolist(), scores.p_value.tolist(), scores.valid.tolist()
    for row in zip(*columns, layers, called, groups, strict=True):
        yield Row(*row)


@dataclass
class Episode:
    """Running figures since the last (re)start of the drift test.

    Of the samples that went into the test, ``tested`` are the positions in the stream, counted from
    1, of as many as it keeps the ranks of, or more.
    """

    seen: int = 0
    scores: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_SCORES))
    flags: deque[bool] = field(default_factory=lambda: deque(maxlen=_RECENT_SCORES))
    tested: "array[int]" = field(default_factory=lambda: array("q"))
    layers: BlockMeans = field(default_factory=BlockMeans)  # of z and of parts, (2, L)
    flagged: deque[FlaggedSample] = field(default_factory=lambda: deque(maxlen=_SAMPLES))

    def add(self, row: Row, flagged: FlaggedSample | None) -> None:
        """Take in a valid sample."""
        self.seen += 1
        self.scores.append(row.score)
        self.flags.append(flagged is not None)
        if flagged is not None:
            self.flagged.append(flagged)
        self.layers.add(row.layers)

    def test(self, position: int) -> None:
        """Take in the place of a sample that the drift test has seen."""
        self.tested.append(position)
        if len(self.tested) > 2 * KEPT:  # seldom, as it moves all that is kept
            del self.tested[:-KEPT]

    def copy(self) -> Self:
        """One that goes on from here, and changes nothing of this one."""
        kept = {name: copy.copy(getattr(self, name)) for name in _KEPT}
        return replace(self, layers=self.layers.copy(), **kept)

    def trace(self, ranks: Sequence[float]) -> tuple[TracePoint, ...]:
        """Tested samples, evenly taken from the latest, whose ranks these are."""
        count = len(ranks)
        picked = np.unique(np.linspace(0, count - 1, min(count, _TRACED)).round().astype(int))
        positions = self.tested[-count:]
        return tuple(TracePoint(positions[i], ranks[i]) for i in picked)

    def evidence(
        self, *, log_e_value: float, ert: float, fpr: float, latest: int | None = None
    ) -> AlertEvidence:
        """The figures of the latest samples, a thousand at most, with what else an alert says."""
        window = len(self.scores) if latest is None else min(latest, len(self.scores))
        scores = list(self.scores)[len(self.scores) - window :]
        flagged = sum(list(self.flags)[len(self.flags) - window :])
        low, high = binomial_interval(flagged, window) if window else (math.nan, math.nan)
        mean, p95 = _mean_and_p95(scores) if window else (None, None)
        return AlertEvidence(
            log_e_value=log_e_value,
            ert=ert,
            fpr=fpr,
            flagged=flagged,
            window=window,
            flagged_rate=flagged / window if window else None,
            flagged_rate_low=low,
            flagged_rate_high=high,
            score_mean=mean,
            score_p95=p95,
        )


@dataclass
class Memory:
    """All that a monitor remembers, but for the drift test.

    Attributes:
        episode: The running figures.
        status: OK, WARN or ALERT, of the samples alone.
        samples_seen: Samples so far, the invalid ones included.
        invalid: Those.
        log_e_value: Of the drift test after the latest sample that it has seen, before it may have
            begun anew; -inf before the first.
        quiet: Samples since the last alarm or flag.
        valid_run: Samples since the last invalid one; None before the first.
        since_told: Samples since the last sample alert; None before the first.
        untold: Flagged samples of which no alert has told.
        stale: Whether the model has other weights than the detector knows.
        quiet_seconds: As ``quiet``, while the monitor runs.
        needed: Samples without an alarm that a recovery takes at least, by what the drift took.
        validity: Whether the latest samples could be scored.
        blind: Whether too many of them could not.
        muted: Samples that are still to pass without a word.
        held: By incident, the alert of its begin or its end that is held while nothing is said.
        owed: Alerts that are decided and not yet handed over.
        said: The number of the latest that the monitor has said.
    """

    episode: Episode = field(default_factory=Episode)
    status: Status = "OK"
    samples_seen: int = 0
    invalid: int = 0
    log_e_value: float = -math.inf
    quiet: int = 0
    valid_run: int | None = None
    since_told: int | None = None
    untold: deque[FlaggedSample] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    stale: bool = False
    quiet_seconds: float = 0.0
    needed: int = 0
    validity: deque[bool] = field(default_factory=lambda: deque(maxlen=_RECENT_VALIDITY))
    blind: bool = False
    muted: int = 0
    held: dict[str, Alert] = field(default_factory=dict)
    owed: deque[Alert] = field(default_factory=deque)
    said: int = 0

    def copy(self) -> Self:
        """One that goes on from here, and changes nothing of this one."""
        return replace(
            self,
            episode=self.episode.copy(),
            untold=copy.copy(self.untold),
            validity=copy.copy(self.validity),
            owed=copy.copy(self.owed),
            held=copy.copy(self.held),
        )

    def disturb(self, status: Status) -> None:
        """What a recovery counts begins anew."""
        self.status, self.quiet, self.quiet_seconds = status, 0, 0.0

    @property
    def overall(self) -> Status:
        """The status, of samples, weights and input together."""
        return overall(self.status, blind=self.blind, stale=self.stale)

    @property
    def standing(self) -> tuple[AlertKind, ...]:
        """The kinds of alerts that stand, the gravest first."""
        stands: dict[AlertKind, bool] = {
            "stale_calibration": self.stale,
            "drift": self.status == "ALERT",
            "invalid_input": self.blind,
        }
        return tuple(kind for kind, is_so in stands.items() if is_so)

    def dump(self) -> dict[str, Any]:
        """All of it, as primitives that JSON can hold."""
        episode = self.episode
        return {
            "status": self.status,
            "samples_seen": self.samples_seen,
            "invalid": self.invalid,
            "log_e_value": self.log_e_value if math.isfinite(self.log_e_value) else None,
            "quiet": self.quiet,
            "valid_run": self.valid_run,
            "since_told": self.since_told,
            "untold": _plain(self.untold),
            "stale": self.stale,
            "quiet_seconds": self.quiet_seconds,
            "needed": self.needed,
            "validity": list(self.validity),
            "blind": self.blind,
            "muted": self.muted,
            "held": {incident: alert.to_json() for incident, alert in self.held.items()},
            "owed": [alert.to_json() for alert in self.owed],
            "said": self.said,
            "seen": episode.seen,
            "scores": [s if math.isfinite(s) else str(s) for s in episode.scores],
            "flags": list(episode.flags),
            "tested": episode.tested[-KEPT:].tolist(),
            "layers": episode.layers.dump(),
            "flagged": _plain(episode.flagged),
        }

    @classmethod
    def parse(cls, state: Mapping[str, Any], layers: int) -> Self:
        """What :meth:`dump` wrote, of a detector with so many layers.

        Raises:
            KeyError: A part is missing.
            TypeError: A part is of another type.
            ValueError: A state that no monitor of this detector has.
        """
        memory = cls(
            episode=_episode(state, layers),
            status=state["status"],
            samples_seen=int(state["samples_seen"]),
            invalid=int(state["invalid"]),
            log_e_value=-math.inf if state["log_e_value"] is None else float(state["log_e_value"]),
            quiet=int(state["quiet"]),
            valid_run=_count_or_none(state["valid_run"]),
            since_told=_count_or_none(state["since_told"]),
            stale=bool(state["stale"]),
            quiet_seconds=number("quiet_seconds", state["quiet_seconds"], 0),
            needed=whole("needed", state["needed"]),
            blind=bool(state["blind"]),
            muted=whole("muted", state["muted"]),
            held={name: Alert.from_json(text) for name, text in dict(state["held"]).items()},
            owed=deque(map(Alert.from_json, state["owed"])),
            said=whole("said", state["said"]),
        )
        memory.validity.extend(map(bool, state["validity"]))
        memory.untold.extend(_flagged(state["untold"]))
        if not memory._is_sound():
            raise ValueError("a state that no monitor of this detector has")
        return memory

    def _is_sound(self) -> bool:
        episode = self.episode
        recent = min(episode.seen, _RECENT_SCORES)
        return (
            self.status in get_args(Status)
            and min(episode.seen, self.samples_seen, self.invalid, self.quiet) >= 0
            and not math.isnan(self.log_e_value)
            and not np.isnan(episode.scores).any()
            and len(episode.flags) == len(episode.scores) == recent
            and min(episode.seen, KEPT) <= episode.layers.count <= episode.seen
        )


def overall(status: Status, *, blind: bool, stale: bool) -> Status:
    """The status of a stream: of its samples, whether they can be scored, and of the weights."""
    if blind or status == "ALERT":
        return "ALERT"
    return "WARN" if stale else status


def top_layers(names: Sequence[str], layers: Array) -> tuple[LayerShare, ...]:
    """The layers furthest from what is usual, with their share of a positive score."""
    return strongest_layers(names, layers[0], _shares(layers))


def strongest_layers(names: Sequence[str], z: Array, share: Array) -> tuple[LayerShare, ...]:
    """Of L layers those furthest from what is usual, by z (L,), with their share (L,)."""
    order = np.argsort(-np.abs(z), kind="stable")[:_LAYERS]
    return tuple(LayerShare(names[i], float(share[i]), float(z[i])) for i in order)


def top_terms(names: Sequence[str], layers: Array) -> tuple[TermShare, ...]:
    """The terms by their share of a positive score; none if there is one term only."""
    shares: dict[str, float] = {}
    for name, share in zip(names, _shares(layers), strict=True):
        term = name.split("/", 1)[0]
        shares[term] = shares.get(term, 0.0) + float(share)
    largest = sorted(shares.items(), key=lambda item: -item[1])[:_LAYERS]
    return tuple(TermShare(*item) for item in largest) if len(shares) > 1 else ()


def _shares(layers: Array) -> Array:
    # Under a full covariance a layer's part may be negative: it speaks for the sample.
    against = np.maximum(layers[1], 0)
    total = against.sum()
    return against / total if total > 0 else np.full_like(against, math.nan)


def _mean_and_p95(scores: Sequence[float]) -> tuple[float, float]:
    with np.errstate(invalid="ignore"):  # infinite scores make them infinite, or nan
        return float(np.mean(scores)), float(np.quantile(scores, 0.95))


def _plain(samples: Sequence[FlaggedSample]) -> list[list[Any]]:
    return [[sample.position, sample.p_value, sample.id] for sample in samples]


def _flagged(rows: Sequence[Sequence[Any]]) -> Iterator[FlaggedSample]:
    return (FlaggedSample(*row) for row in rows)


def _count_or_none(value: Any) -> int | None:
    return None if value is None else int(value)


def _episode(state: Mapping[str, Any], layers: int) -> Episode:
    episode = Episode(int(state["seen"]))
    episode.scores.extend(map(float, state["scores"]))
    episode.flags.extend(map(bool, state["flags"]))
    episode.tested.extend(whole("tested", position, 1) for position in state["tested"])
    episode.layers = BlockMeans.parse(state["layers"], (2, layers))
    episode.flagged.extend(_flagged(state["flagged"]))
    return episode
