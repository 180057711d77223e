import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from threading import Thread

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from support.alert_cases import EVIDENCE

from ood_monitor import plots
from ood_monitor.alerts import Alert, LayerShare, TermShare, TracePoint
from ood_monitor.plots import (
    alert_figure,
    correlation_figure,
    evidence_figure,
    layer_histograms,
    misfit_figure,
    quantile_figure,
    score_histogram,
    stream_figure,
    top_layer_figure,
)

LAYERS = (LayerShare("up.0.weight", 0.2, 3.0), LayerShare("mid.bias", 0.7, -8.0))
ALERT = Alert(
    kind="drift",
    severity="critical",
    stream="$a$ and $b",
    samples_seen=12345,
    message="Unlike the training data.",
    evidence=EVIDENCE,
    top_layers=LAYERS,
    detector="d5",
    model="m7",
)


LONG = "latent_1/up_blocks.3.resnets.0.time_emb_proj.parametrizations.weight.original0"


def normal(mean: float, n: int = 400) -> NDArray[np.float64]:
    return np.random.default_rng(0).normal(mean, 1.0, n)


def png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def legend(figure: Figure | Axes) -> list[str]:
    owner = figure.legends[0] if isinstance(figure, Figure) else figure.get_legend()
    return [text.get_text() for text in owner.get_texts()]


def outlines(axes: Axes) -> list[NDArray[np.float64]]:
    """The corners of each histogram of `axes`, of shape (2 * bins + 1 or more, 2)."""
    return [patch.get_xy() for patch in axes.patches]


def area(outline: NDArray[np.float64]) -> float:
    x, y = outline.T
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2


FIGURES = {
    "scores": lambda: score_histogram({"calibration": normal(0), "val": normal(4)}, title="Scores"),
    "layers": lambda: layer_histograms({"w": normal(0)}, {"w": (0.0, 1.0)}),
    "alert": lambda: alert_figure(ALERT),
    "evidence": lambda: evidence_figure(normal(0), ert=1000, alarms=[3]),
    "quantiles": lambda: quantile_figure({"w": normal(0)}),
    "stream": lambda: stream_figure(normal(0), normal(0) > 1, fpr=0.1),
    "misfit": lambda: misfit_figure({"w": 0.1, "b": 0.4}, limit=0.2),
    "correlation": lambda: correlation_figure([LONG, "b"], [[1, -0.5], [-0.5, 1]]),
    "top layers": lambda: top_layer_figure({LONG: 3, "b": 7}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_say_what_they_show(name: str) -> None:
    figure = FIGURES[name]()
    axes = figure.axes[0]
    assert tuple(figure.get_size_inches()) == (6.0, 4.0)
    assert axes.get_title() or figure.get_suptitle()
    labels = (
        axes.get_xlabel() or figure.get_supxlabel(),
        axes.get_ylabel() or figure.get_supylabel() or "its ticks have names, no unit",
    )
    for label in labels:
        assert any(unit in label for unit in ("unit", "nats", "deviations", "samples")), label
    assert png(figure).startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off(name: str) -> None:
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    box, page = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= page[0]
    assert box.y1 <= page[1]


@pytest.mark.parametrize("name", FIGURES)
def test_figures_work_in_any_thread(name: str) -> None:
    images: list[bytes] = []
    threads = [Thread(target=lambda: images.append(png(FIGURES[name]()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert images == [png(FIGURES[name]())] * 2


@pytest.mark.parametrize("name", FIGURES)
def test_pyplot_is_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # whoever imports it fails
    runpy.run_path(plots.__file__)
    png(FIGURES[name]())


def test_score_histogram_has_each_group_at_its_density() -> None:
    values = normal(0)
    values[:2] = np.nan, np.inf
    figure = score_histogram({"calibration": values, "val": normal(9, 50)}, title="Scores")
    (axes,) = figure.axes
    assert axes.get_title() == "Scores"
    assert legend(axes) == ["calibration (n = 398, 2 not finite)", "val (n = 50)"]
    calibration, val = outlines(axes)
    assert area(calibration) == pytest.approx(1.0)
    assert area(val) == pytest.approx(1.0)
    assert calibration[:, 0].max() == pytest.approx(np.nanmax(values[2:]))
    assert val[:, 0].min() == pytest.approx(normal(9, 50).min())
    assert axes.get_yscale() == "linear"


def test_score_histogram_on_a_logarithmic_axis() -> None:
    figure = score_histogram({"a": normal(0)}, title="Scores", log_density=True)
    assert figure.axes[0].get_yscale() == "log"


def test_scores_of_all_magnitudes_are_seen() -> None:
    groups = {"calibration": normal(0), "val": 1e6 * normal(9, 50), "below": -1e3 + normal(0)}
    figure = score_histogram(groups, title="Scores")
    (axes,) = figure.axes
    assert axes.get_xscale() == "asinh"
    assert axes.get_ylabel() == "share of the samples"
    for outline, values in zip(outlines(axes), groups.values(), strict=True):
        heights = outline[:, 1]
        assert 0.02 < heights.max() < 1 + 1e-9
        inside = outline[heights > 0, 0]
        assert inside.min() <= values.min()
        assert inside.max() >= values.max()
    png(figure)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "at least one group"),
        ({"val": []}, "finite value of 'val'"),
        ({"val": [np.nan, np.inf]}, "finite value of 'val'"),
    ],
)
def test_score_histogram_needs_scores(groups: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_histogram(groups, title="Scores")


def test_layer_histograms_overlay_the_fitted_normal() -> None:
    features = {f"block.{k}.weight": normal(k) for k in range(4)}
    fitted = {name: (float(k), 2.0) for k, name in enumerate(features)}
    other = {"KMNIST": {name: values + 5 for name, values in features.items()}}
    del other["KMNIST"]["block.3.weight"]
    figure = layer_histograms(features, fitted, other=other)
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == list(features)
    assert legend(figure) == ["in-distribution", "KMNIST", "fitted normal"]
    assert [len(axes.patches) for axes in shown] == [2, 2, 2, 1]
    for k, axes in enumerate(shown):
        x, y = axes.lines[0].get_data()
        assert x[np.argmax(y)] == pytest.approx(k, abs=0.05)
        assert y.max() == pytest.approx(1 / (2 * np.sqrt(2 * np.pi)), rel=1e-3)
    theirs = outlines(shown[0])[1]
    assert area(theirs) == pytest.approx(1.0)
    assert theirs[:, 0].min() == pytest.approx(features["block.0.weight"].min() + 5)


@pytest.mark.parametrize(
    ("features", "fitted", "message"),
    [
        ({}, {}, "each layer"),
        ({"w": [1.0], "b": [1.0]}, {"w": (0.0, 1.0)}, r"not for \['b'\]"),
        ({"w": [1.0]}, {"w": (0.0, 0.0)}, "positive standard deviation of 'w', got 0.0"),
        ({"w": [1.0]}, {"w": (0.0, float("nan"))}, "positive standard deviation of 'w', got nan"),
        ({"w": [-np.inf]}, {"w": (0.0, 1.0)}, "finite value of 'w of in-distribution'"),
    ],
)
def test_layer_histograms_need_a_fit_of_each_layer(
    features: dict[str, list[float]], fitted: dict[str, tuple[float, float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layer_histograms(features, fitted)


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def names(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_alert_figure_sorts_layers_by_distance() -> None:
    figure = alert_figure(ALERT)
    *_, axes = figure.axes
    assert names(axes) == ["up.0.weight", "mid.bias"]
    assert [bar.get_width() for bar in axes.patches] == [3.0, -8.0]  # the last is on top
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
    assert texts(axes) == ["20%", "70%"]
    assert "12,345 samples seen" in figure.get_suptitle()


def test_alert_figure_marks_the_change_and_shows_the_terms() -> None:
    trace = [TracePoint(at, 1 - at / 100) for at in range(1, 100)]
    evidence = replace(ALERT.evidence, since=60, since_earliest=55, since_latest=64)
    terms = (TermShare("values", 0.8), TermShare("expected_norms", 0.2))
    found = alert_figure(replace(ALERT, trace=trace, evidence=evidence, top_terms=terms))
    stream, shares, _ = found.axes
    assert [text.get_text() for text in stream.get_legend().get_texts()] == [
        "evidence since about sample 60"
    ]
    assert list(stream.lines[0].get_xdata()) == [60, 60]
    marked = stream.patches[0].get_extents().transformed(stream.transData.inverted())
    assert (marked.x0, marked.x1) == pytest.approx((55, 64))
    assert len(stream.collections[0].get_offsets()) == 99
    assert names(shares) == ["values", "expected_norms"]
    assert texts(shares) == ["80%", "20%"]


def test_alert_figure_without_layers_says_so() -> None:
    for layers in ((), (LayerShare("w", None, None),)):
        (axes,) = alert_figure(replace(ALERT, top_layers=layers)).axes
        assert texts(axes) == ["This alert names no layer."]


def test_long_names_lose_their_beginning_and_stay_apart() -> None:
    end = "time_emb_proj.parametrizations.weight.original0"
    long = [f"up_blocks.{i}.resnets.0.{end}" for i in range(3)]
    layers = tuple(LayerShare(name, None, 1.0) for name in long)
    (axes,) = alert_figure(replace(ALERT, top_layers=layers)).axes
    assert len(set(names(axes))) == 3
    assert all(name.startswith("…") and name.endswith(end) for name in names(axes))
    (axes,) = alert_figure(replace(ALERT, top_layers=layers[:1])).axes
    assert len(names(axes)[0]) == 40


def test_dollars_are_no_formulas() -> None:
    """Matplotlib would refuse, or set as a formula, what stands between two of them."""
    odd = r"$\frac$"
    png(quantile_figure({odd: normal(0)}))
    png(correlation_figure([odd], [[1.0]]))
    png(top_layer_figure({odd: 1}))
    layer = LayerShare(odd, 0.5, 1.0)
    png(alert_figure(replace(ALERT, stream=odd, top_layers=(layer,))))
    png(score_histogram({odd: normal(0)}, title=odd))
    png(layer_histograms({odd: normal(0)}, {odd: (0.0, 1.0)}, other={odd: {odd: normal(1)}}))


def test_evidence_figure_marks_threshold_and_alarms() -> None:
    values = np.array([-np.inf, 0.5, 2.0, 7.5])
    (axes,) = evidence_figure(values, ert=1000, alarms=[3, 4]).axes
    curve, threshold, *alarms = axes.lines
    assert curve.get_xdata().tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(curve.get_ydata(), [np.nan, 0.5, 2.0, 7.5])
    assert set(threshold.get_ydata()) == {np.log(1000)}
    assert [line.get_xdata()[0] for line in alarms] == [3, 4]
    expected = ["evidence", "threshold: one false alarm in 1,000 samples", "alarm"]
    assert legend(axes) == expected


@pytest.mark.parametrize("ert", [0.0, -1.0, float("nan"), float("inf")])
def test_evidence_figure_needs_a_threshold(ert: float) -> None:
    with pytest.raises(ValueError, match="positive, finite ERT"):
        evidence_figure([1.0], ert=ert)


def test_evidence_figure_needs_one_stream() -> None:
    with pytest.raises(ValueError, match=r"shape \(N,\), got \(2, 3\)"):
        evidence_figure(np.zeros((2, 3)), ert=10)


def test_quantile_figure_is_on_the_line_for_a_normal_and_off_it_for_another() -> None:
    values = normal(0, 2000)
    values[0] = np.nan
    figure = quantile_figure({"w": values, "b": 2 * values})
    for axes, slope in zip(figure.axes, (1, 2), strict=True):
        line, points = axes.lines
        assert line.get_xdata().tolist() == line.get_ydata().tolist()
        x, y = points.get_data()
        assert 100 < len(x) <= 200
        assert np.polyfit(x, y, 1)[0] == pytest.approx(slope, rel=0.05)


def test_misfit_figure_tells_the_layers_beyond_the_limit_apart() -> None:
    (axes,) = misfit_figure({"a": 0.1, "b": 0.5, "c": 0.2}, limit=0.2).axes
    fitted, poor, limit = axes.lines
    assert fitted.get_xdata().tolist() == [1, 3]
    assert (poor.get_xdata().tolist(), poor.get_ydata().tolist()) == ([2], [0.5])
    assert set(limit.get_ydata()) == {0.2}


def test_correlation_figure_shows_every_pair_with_its_sign() -> None:
    matrix = [[1.0, -0.5], [-0.5, 1.0]]
    axes = correlation_figure(["a", "b"], matrix).axes[0]
    (image,) = axes.images
    assert image.get_array().tolist() == matrix
    assert image.get_clim() == (-1, 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a 1", "b 2"]
    many = correlation_figure([f"layer {i}" for i in range(40)], np.eye(40)).axes[0]
    assert not any(label.get_text().startswith("layer") for label in many.get_yticklabels())


def test_many_points_of_a_quantile_figure_become_few_with_the_outermost() -> None:
    values = np.random.default_rng(0).normal(size=20_000)
    (axes,) = quantile_figure({"w": values}).axes
    _, points = axes.get_lines()
    assert len(points.get_xdata()) <= 200
    ends = np.sort(values)
    np.testing.assert_array_equal(np.asarray(points.get_ydata())[[0, -1]], ends[[0, -1]])


def test_stream_figure_shows_what_is_flagged_when() -> None:
    scores, flags = np.zeros(600), np.arange(600) >= 300
    scores[:10] = np.nan
    above, below = stream_figure(scores, flags, fpr=0.01).axes
    (line, _) = below.get_lines()
    at, share = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert set(share[at < 300]) == {0.0}
    assert set(share[at > 301]) == {1.0}
    assert len(at) == 59  # of sixty stretches one has no score
    assert above.get_ylabel() == "anomaly score (no unit)"


def test_top_layer_figure_has_the_most_on_top() -> None:
    (axes,) = top_layer_figure({"a": 3, "b": 7, "c": 1}).axes
    assert [bar.get_width() for bar in axes.patches] == [1, 3, 7]  # the last is on top
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: quantile_figure({}), "at least one layer"),
        (lambda: quantile_figure({"w": [np.nan]}), "finite value of 'w'"),
        (lambda: stream_figure([np.nan], [False], fpr=0.1), "finite value of 'the stream'"),
        (lambda: stream_figure([1.0], [False, True], fpr=0.1), r"got \(1,\), \(2,\)"),
        (lambda: stream_figure([1.0], [False], fpr=1.0), r"fpr in \(0, 1\)"),
        (lambda: misfit_figure({}, limit=0.2), "at least one layer"),
        (lambda: correlation_figure([], []), r"\(0, 0\) correlations"),
        (lambda: correlation_figure(["a"], np.eye(2)), r"\(1, 1\) correlations, got \(2, 2\)"),
        (lambda: top_layer_figure({}), "at least one flagged sample"),
    ],
)
def test_figures_of_a_report_need_something_to_show(
    draw: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw()
