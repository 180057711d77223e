"""The examples run from a folder of their own, and find what they say that they find."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

#: By file: arguments. `make demo` runs the other one.
ARGUMENTS: dict[str, list[str]] = {
    "accelerate_loop.py": [],
    "diffusers_digits.py": [],
    "diffusers_service.py": [],
    "lightning_cli.py": ["fit", "--config", str(EXAMPLES / "lightning_cli.yaml")],
    "lightning_corrupt_shard.py": [],
    "lightning_diffusion.py": [],
    "transformers_sft.py": [],
}


def test_every_example_is_run() -> None:
    assert ARGUMENTS.keys() | {"digits_demo.py"} == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_example_ends_well(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / name), *ARGUMENTS[name]]
    subprocess.run(command, cwd=tmp_path, check=True)
