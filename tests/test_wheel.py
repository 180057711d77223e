"""What is published: both packages, and nothing else."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent

#: What the packages read when they run, what type checkers look for, and what receivers check by.
BESIDE_THE_CODE = {
    "ood_monitor/py.typed",
    "ood_monitor_integrations/py.typed",
    "ood_monitor/alerts/alert.schema.json",
    *(str(file.relative_to(ROOT)) for file in (ROOT / "ood_monitor").rglob("*.html")),
}


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"ood_monitor", "ood_monitor_integrations", "ood_monitor-0.1.0.dist-info"}
    assert set(names) >= BESIDE_THE_CODE
    assert "ood_monitor-0.1.0.dist-info/licenses/LICENSE" in names
