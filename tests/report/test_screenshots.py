"""What the documentation's pictures are taken of: three alerts, each with its answers first."""

import importlib.util
from pathlib import Path

import pytest

from ood_monitor.alerts import AlertKind, guidance_of

SCRIPT = Path(__file__).parents[2] / "docs" / "screenshots.py"

STORIES: dict[str, AlertKind] = {
    "one-sample": "sample",
    "drift": "drift",
    "stale-detector": "stale_calibration",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Stale calibration:UserWarning")
def test_three_alerts_are_understood_from_the_first_screen(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("screenshots", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page, *reports = script.make(tmp_path)
    assert [path.stem.removeprefix("report-") for path in reports] == list(STORIES)
    for path, kind in zip(reports, STORIES.values(), strict=True):
        html = path.read_text()
        banner = html.partition('<section class="banner')[2].partition("</section>")[0]
        guidance = guidance_of(kind)
        for part in (guidance.means, "<b>Since</b>", guidance.do, guidance.means_not):
            assert part in banner, (path, part)
        assert "data:image/png" in html
        assert guidance.means in page.read_text()
