import csv
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.cli_cases import flow, grey_images, write_images, write_pipeline
from typer.main import get_command
from typer.testing import CliRunner, Result

import ood_monitor as om
from ood_monitor.cli import app
from ood_monitor.cli.options import Scoring

FLOW = "support.cli_cases:flow"
COLUMNS = "support.cli_cases:columns"


#: Commands of a detector that is there.
LATER = ("verify", "recalibrate", "accept")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeeded(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def failed(*arguments: object) -> str:
    """The one line of an error."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.output
    return result.stderr


@pytest.mark.parametrize("command", ["score", "report", "verify", "recalibrate"])
def test_commands_that_score_data_have_the_same_options_with_the_same_defaults(
    command: str,
) -> None:
    found = {p.name: p.default for p in get_command(app).commands[command].params}  # type: ignore[attr-defined]
    assert {name: found.get(name, "none such") for name in vars(Scoring())} == vars(Scoring())


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("held_out"), grey_images(240))


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four usual images, a blank one, and one that is none."""
    folder = write_images(tmp_path_factory.mktemp("new"), grey_images(4, seed=1))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "blank.png")
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    return folder


@pytest.fixture(scope="module")
def detector(held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detectors") / "flow"
    succeeded("fit", FLOW, held_out, folder)
    return folder


def test_help_has_an_example_of_every_command() -> None:
    commands = succeeded("--help").stdout.split("Commands:")[1].split()
    for name in ("fit", "score", "watch", "report", "push", "pull", "show", *LATER):
        assert name in commands
        assert f"\n      ood-monitor {name} " in succeeded(name, "--help").stdout


def test_a_detector_is_verified_by_what_it_was_fitted_on(
    detector: Path, held_out: Path, new: Path
) -> None:
    text = succeeded("verify", detector, held_out).stderr
    assert "as where it was fitted: 16 of 16 remembered samples, p-values within 0 (0 ste" in text
    found = json.loads(succeeded("verify", detector, held_out, "--json").stdout)
    assert found == {"found": 16, "remembered": 16, "difference": 0.0, "steps": 0}
    (new / "broken.png").rename(new.parent / "away.png")
    assert "got none: give the data that it was fitted on" in failed("verify", detector, new)
    (new.parent / "away.png").rename(new / "broken.png")


def test_a_detector_is_recalibrated_into_a_folder_of_its_own(
    detector: Path, tmp_path: Path
) -> None:
    normal = write_images(tmp_path / "normal", grey_images(60, seed=5))
    output = tmp_path / "recalibrated"
    facts = json.loads(succeeded("recalibrate", detector, normal, output, "--json").stdout)
    assert facts["calibration samples"] == 60
    succeeded("verify", output, normal)
    assert "Expected a new folder" in failed("recalibrate", detector, normal, output)
    assert "at least 20 scores" in failed(
        "recalibrate", detector, write_images(tmp_path / "few", grey_images(5)), tmp_path / "x"
    )
    assert not (tmp_path / "x").exists()


def test_version_is_the_packages() -> None:
    assert succeeded("version").stdout.strip() == om.__version__


def test_show_says_what_a_detector_was_fitted_on(detector: Path) -> None:
    facts = json.loads(succeeded("show", detector, "--json").stdout)
    assert facts["fit samples"] == facts["calibration samples"] == 120
    assert facts["samples"] == "(1, 4, 4) torch.float32"
    assert "calibration samples     120" in succeeded("show", detector).stdout


def test_fit_gives_the_detector_that_the_library_gives(detector: Path, held_out: Path) -> None:
    loaded = om.Detector.from_pretrained(detector, flow())
    images = torch.tensor(grey_images(240) / 255, dtype=torch.float32).unsqueeze(1)
    order = np.random.default_rng(0).permutation(240)
    own = om.Detector(flow()).fit(images[order].split(32), progress=False)
    assert loaded.fitted.fingerprint == own.fitted.fingerprint


def test_fit_says_how_the_model_is_made(held_out: Path, tmp_path: Path) -> None:
    options = ["--arg", "hidden=6", "--layer", "levels.0.*", "--seed", 3]
    facts = succeeded("fit", FLOW, held_out, tmp_path, *options, "--json").stdout
    assert json.loads(facts)["detector"] == str(tmp_path)
    recipe = json.loads((tmp_path / "model.json").read_text())
    assert recipe == {
        "format": 1,
        "kind": "adapter",
        "model": FLOW,
        "arguments": {"hidden": 6},
        "levels": None,
        "layers": ["levels.0.*"],
        "seed": 3,
        "images": {"mode": "L", "size": [4, 4], "resize": False},
    }
    assert succeeded("score", tmp_path, held_out, "--json", "-o", tmp_path / "s.csv").stdout


def test_fit_takes_a_method(held_out: Path, tmp_path: Path) -> None:
    succeeded("fit", FLOW, held_out, tmp_path, "--method", "forward")
    facts = json.loads(succeeded("show", tmp_path, "--json").stdout)
    assert facts["method"] == "forward (chosen)"
    assert facts["parts"] == "values (GaussianMixture), expected_norms (ShrunkGaussian)"
    assert succeeded("score", tmp_path, held_out, "--json", "-o", tmp_path / "s.csv").stdout


def test_fit_takes_samples_at_random_and_at_most_so_many(held_out: Path, tmp_path: Path) -> None:
    facts = succeeded("fit", FLOW, held_out, tmp_path, "--samples", 200, "--json").stdout
    assert json.loads(facts)["calibration samples"] == 100


def test_fit_on_arrays_of_bytes_is_fit_on_their_images(detector: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=grey_images(240), labels=np.zeros(240))
    succeeded("fit", FLOW, tmp_path / "data.npz", tmp_path / "d", "--key", "images")
    fingerprints = {
        json.loads(succeeded("show", folder, "--json").stdout)["fingerprint"]
        for folder in (detector, tmp_path / "d")
    }
    assert len(fingerprints) == 1


def test_fit_on_arrays_of_floats_takes_them_as_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", np.random.default_rng(0).random((240, 1, 4, 4)))
    succeeded("fit", FLOW, tmp_path / "data.npz", tmp_path / "d")
    rows = lines(succeeded("score", tmp_path / "d", tmp_path / "data.npz").stdout)
    assert [row["id"] for row in rows[:2]] == ["0", "1"]
    assert all(row["valid"] for row in rows)


@pytest.mark.parametrize("names", ["", "first,second\n", '"one, two",three\n', "\ufeffa,b\n"])
def test_rows_of_a_csv_are_those_of_an_array(names: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(240, 2)).astype(np.float32)
    np.savez(tmp_path / "data.npz", rows)
    text = "\n".join(",".join(map(str, row.tolist())) for row in rows)
    (tmp_path / "data.csv").write_text(names + text + "\n", encoding="utf-8")
    scores = []
    for kind in ("npz", "csv"):
        succeeded("fit", COLUMNS, tmp_path / f"data.{kind}", tmp_path / kind)
        scores.append(succeeded("score", tmp_path / kind, tmp_path / f"data.{kind}").stdout)
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("text", "options", "told"),
    [
        ("a,b\n1,2\n3,x\n", (), "after the line of names: could not convert string 'x'"),
        ("1,2\n3\n", (), "as many in each row"),
        ("1,2\n,3\n", (), "could not convert string ''"),
        ("a,b\n", (), "without any row of numbers"),
        ("", (), "without any row of numbers"),
        ("1,2\n", ("--key", "a"), "Expected no `--key` of a .csv"),
    ],
)
def test_a_csv_of_other_than_numbers_is_refused(
    text: str, options: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    (tmp_path / "data.csv").write_text(text)
    assert told in failed("fit", COLUMNS, tmp_path / "data.csv", tmp_path / "d", *options)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("images", [grey_images(240), grey_images(240)[:, None] / 255])
def test_a_detector_that_was_fitted_on_arrays_watches_a_folder(
    images: np.ndarray, new: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", images)
    succeeded("fit", FLOW, tmp_path / "data.npz", tmp_path / "d")
    result = run("watch", tmp_path / "d", new, "--once", "--json")
    summary = json.loads(result.stdout.splitlines()[-1])["summary"]
    assert (summary["samples_seen"], summary["unreadable"]) == (6, 1)


def test_images_of_other_colours_and_sizes_are_brought_to_those_of_the_fit(
    held_out: Path, tmp_path: Path
) -> None:
    succeeded("fit", FLOW, held_out, tmp_path / "d", "--size", "4x4")
    pixels = np.repeat(np.repeat(grey_images(2), 3, 1), 3, 2)
    write_images(tmp_path / "big", np.stack([pixels] * 3, -1))
    assert all(row["valid"] for row in lines(succeeded("score", tmp_path / "d", tmp_path / "big")))


def test_16_bit_images_are_scaled_and_not_clipped(detector: Path, tmp_path: Path) -> None:
    image = grey_images(1)[0]
    Image.fromarray(image).save(tmp_path / "8.png")
    Image.fromarray(image.astype(np.uint16) * 257).save(tmp_path / "16.png")
    first, second = lines(succeeded("score", detector, tmp_path))
    assert first["score"] == second["score"]


def lines(result: Result | str) -> list[dict[str, object]]:
    text = result if isinstance(result, str) else result.stdout
    return [json.loads(line) for line in text.splitlines()]


def test_score_gives_a_row_for_each_file(detector: Path, new: Path) -> None:
    result = succeeded("score", detector, new)
    rows = {row["id"]: row for row in lines(result)}
    assert list(rows) == ["0000.png", "0001.png", "0002.png", "0003.png", "blank.png", "broken.png"]
    assert rows["blank.png"]["flagged"] is True
    assert rows["blank.png"]["p_value"] == pytest.approx(1 / 121)
    assert str(rows["blank.png"]["top_layer"]).startswith(("values/", "expected_norms/levels."))
    assert rows["broken.png"] == {
        **dict.fromkeys(("score", "p_value", "log_likelihood", "top_layer", "top_z", "group")),
        "id": "broken.png",
        "flagged": False,
        "fpr": 0.01,
        "valid": False,
    }
    assert "broken.png" in result.stderr
    flagged = sum(row["flagged"] is True for row in rows.values())
    assert f"6 samples, {flagged} flagged at fpr 0.01, 1 not scored." in result.stderr


def test_scores_are_those_of_the_library_in_any_batches(detector: Path, new: Path) -> None:
    own = om.Detector.from_pretrained(detector, flow())
    images = torch.tensor(grey_images(4, seed=1) / 255, dtype=torch.float32).unsqueeze(1)
    expected = own.score(images)
    rows = lines(succeeded("score", detector, new, "--batch-size", 3))[:4]
    assert [row["p_value"] for row in rows] == expected.p_value.tolist()
    np.testing.assert_allclose([row["score"] for row in rows], expected.score)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_every_format_says_the_same(detector: Path, new: Path, tmp_path: Path, suffix: str) -> None:
    rows = lines(succeeded("score", detector, new))
    output = tmp_path / f"scores.{suffix}"
    summary = json.loads(succeeded("score", detector, new, "-o", output, "--json").stdout)
    assert summary["samples"] == 6
    assert read(output) == rows
    assert list(tmp_path.iterdir()) == [output]


def read(path: Path) -> Sequence[dict[str, object]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()  # type: ignore[no-any-return]
    if path.suffix == ".jsonl":
        return lines(path.read_text())
    with path.open(newline="") as file:
        return [{k: value_of(k, v) for k, v in row.items()} for row in csv.DictReader(file)]


def value_of(name: str, text: str) -> object:
    if name in ("id", "top_layer"):
        return text or None
    return text == "True" if name in ("flagged", "valid") else float(text) if text else None


def test_a_failed_score_leaves_no_file(detector: Path, held_out: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", np.zeros((3, 1, 5, 5), np.float32))
    output = tmp_path / "scores.csv"
    output.write_text("of last week\n")
    assert "(1, 5, 5)" in failed("score", detector, tmp_path / "other.npz", "-o", output)
    assert output.read_text() == "of last week\n"
    assert {path.name for path in tmp_path.iterdir()} == {"other.npz", "scores.csv"}


def test_samples_that_are_not_finite_are_not_scored(detector: Path, tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((3, 1, 4, 4))
    data[1, 0, 0, 0] = np.nan
    np.savez(tmp_path / "data.npz", data)
    rows = lines(succeeded("score", detector, tmp_path / "data.npz"))
    assert [row["valid"] for row in rows] == [True, False, True]


def test_a_pipelines_detector_needs_its_folder_alone(tmp_path: Path, new: Path) -> None:
    pipe = write_pipeline(tmp_path / "pipe")
    data = write_images(
        tmp_path / "data", np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    )
    options = ["--level", 300, "--layer", "conv_out.*", "--fpr", 0.1, "--batch-size", 16]
    options += ["--method", "gradient_norms"]
    succeeded("fit", pipe, data, tmp_path / "d", *options)
    rows = lines(succeeded("score", tmp_path / "d", data, "--fpr", 0.1))
    assert len(rows) == 60
    assert all(row["valid"] for row in rows)
    assert 0.2 < np.median([float(str(row["p_value"])) for row in rows]) < 0.8
    recipe = json.loads((tmp_path / "d" / "model.json").read_text())
    assert (recipe["kind"], recipe["levels"]) == ("pipeline", [300])


def test_a_pipeline_that_moved_is_given_by_model(tmp_path: Path) -> None:
    pipe = write_pipeline(tmp_path / "pipe")
    data = write_images(
        tmp_path / "data", np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    )
    options = ["--level", 300, "--layer", "conv_out.*", "--fpr", 0.1]
    succeeded("fit", pipe, data, tmp_path / "d", *options)
    moved = pipe.rename(tmp_path / "moved")
    assert "pipe" in failed("score", tmp_path / "d", data, "--fpr", 0.1)
    succeeded("score", tmp_path / "d", data, "--fpr", 0.1, "--model", moved)


def test_other_weights_are_told_of(detector: Path, new: Path) -> None:
    def stale(**changes: object) -> str:
        recipe = json.loads((detector / "model.json").read_text())
        return json.dumps(recipe | changes)

    before = (detector / "model.json").read_text()
    (detector / "model.json").write_text(stale(model="support.cli_cases:other_flow"))
    try:
        result = succeeded("score", detector, new)
    finally:
        (detector / "model.json").write_text(before)
    assert "tale calibration" in result.stderr
    assert len(lines(result)) == 6


FIT_ERRORS: dict[str, tuple[list[str], str]] = {
    "no model": (["nowhere", "DATA"], "model_index.json"),
    "no module": (["nowhere:adapter", "DATA"], "nowhere"),
    "no function": (["support.cli_cases:missing", "DATA"], "'missing'"),
    "not annotated": (["support.cli_cases:not_annotated", "DATA"], "-> ood_monitor.Adapter"),
    "code that is no adapter's": (["os:system", "DATA", "--arg", 'command="exit"'], "os:system"),
    "no adapter": (["support.cli_cases:nothing", "DATA"], "NoneType"),
    "an unknown argument": ([FLOW, "DATA", "--arg", "size=3"], "size"),
    "an argument that is no JSON": ([FLOW, "DATA", "--arg", "hidden=six"], "NAME=JSON"),
    "no data": ([FLOW, "nowhere"], "nowhere"),
    "a file that is no data": ([FLOW, "DATA/0000.png"], ".npz"),
    "an fpr that cannot be reached": ([FLOW, "DATA", "--fpr", "0.001"], "at least 1998 samples"),
    "no rate": ([FLOW, "DATA", "--fpr", "2"], "(0, 1)"),
    "no size": ([FLOW, "DATA", "--size", "big"], "HxW"),
    "levels of a flow": ([FLOW, "DATA", "--level", "3"], "noise levels"),
    "an unknown layer": ([FLOW, "DATA", "--layer", "up.*"], "up.*"),
    "colours of a grey model": ([FLOW, "DATA", "--mode", "RGB"], ""),
}


@pytest.mark.parametrize("name", FIT_ERRORS)
def test_a_wrong_fit_is_one_line_and_writes_nothing(
    name: str, held_out: Path, tmp_path: Path
) -> None:
    arguments, message = FIT_ERRORS[name]
    arguments = [text.replace("DATA", str(held_out)) for text in arguments]
    assert message in failed("fit", *arguments[:2], tmp_path / "d", *arguments[2:])
    assert not (tmp_path / "d").exists()


MISSING = {
    "datasets": ("fit", [FLOW, "DATASET", "NEW"], "pip install datasets"),
    "pyarrow": ("score", ["DETECTOR", "DATA", "-o", "s.parquet"], "'ood-monitor[mlflow]'"),
    "matplotlib": ("report", ["DETECTOR", "r.html"], "'ood-monitor[plots]'"),
    "diffusers": ("score", ["PIPELINE", "DATA"], "'ood-monitor[diffusers]'"),
}


@pytest.mark.parametrize("library", MISSING)
def test_a_library_that_is_missing_is_named_with_what_installs_it(
    library: str, detector: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, arguments, message = MISSING[library]
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "dataset_info.json").write_text("{}")
    (tmp_path / "pipeline").mkdir()
    recipe = json.loads((detector / "model.json").read_text())
    (tmp_path / "pipeline" / "model.json").write_text(json.dumps(recipe | {"kind": "pipeline"}))
    places = {
        "DATASET": tmp_path / "dataset",
        "DATA": new,
        "DETECTOR": detector,
        "NEW": tmp_path / "d",
        "PIPELINE": tmp_path / "pipeline",
    }
    with monkeypatch.context() as patch:
        ours = ("ood_monitor.cli.pipelines", "ood_monitor.plots", "ood_monitor.report")
        for name in [name for name in sys.modules if _is_of(name, library, *ours)]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, library, None)  # whoever imports it fails
        patch.chdir(tmp_path)
        assert message in failed(command, *(places.get(text, text) for text in arguments))


def _is_of(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_a_stored_dataset_is_fitted_on_and_scored(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(image) for image in grey_images(240)]
    rows = {"image": pictures, "label": list(range(240))}
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_dict(rows), "test": datasets.Dataset.from_dict(rows)}
    )
    splits.save_to_disk(tmp_path / "data")
    succeeded("fit", FLOW, tmp_path / "data", tmp_path / "d", "--split", "test")
    folder = write_images(tmp_path / "images", grey_images(240))
    expected = [row["score"] for row in lines(succeeded("score", tmp_path / "d", folder))]
    found = lines(succeeded("score", tmp_path / "d", tmp_path / "data", "--split", "train"))
    assert [row["score"] for row in found] == expected
    assert "--split" in failed("score", tmp_path / "d", tmp_path / "data")
    error = failed("score", tmp_path / "d", tmp_path / "data", "--split", "test", "--key", "x")
    assert "['image', 'label']" in error


def test_a_broken_image_stops_a_fit_by_its_name(held_out: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "data", grey_images(200))
    (tmp_path / "data" / "x.png").write_bytes(b"\x89PNG no more")
    assert "x.png" in failed("fit", FLOW, tmp_path / "data", tmp_path / "d")


def test_an_image_of_another_size_stops_a_fit(tmp_path: Path) -> None:
    write_images(tmp_path / "data", grey_images(200))
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(tmp_path / "data" / "zz.png")
    message = failed("fit", FLOW, tmp_path / "data", tmp_path / "d")
    assert "4 x 4 pixels, got 5 x 4" in message
    assert "zz.png" in message


def test_a_detector_is_not_overwritten_unasked(held_out: Path, tmp_path: Path) -> None:
    succeeded("fit", FLOW, held_out, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    assert "--overwrite" in failed("fit", FLOW, held_out, tmp_path, "--seed", 1)
    assert (tmp_path / "config.json").read_bytes() == before
    succeeded("fit", FLOW, held_out, tmp_path, "--seed", 1, "--overwrite")
    assert (tmp_path / "config.json").read_bytes() != before


def test_an_adapter_in_the_current_directory_is_found(
    held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ("import ood_monitor as om", "from support import cli_cases")
    lines += ("def here() -> om.Adapter:", "    return ")
    (tmp_path / "my_models.py").write_text("\n".join(lines) + "cli_cases.flow()\n")
    monkeypatch.chdir(tmp_path)
    succeeded("fit", "my_models:here", held_out, "d")


SCORE_ERRORS: dict[str, tuple[list[str], str]] = {
    "a format": (["DETECTOR", "DATA", "-o", "scores.xlsx"], ".parquet"),
    "a folder that is missing": (["DETECTOR", "DATA", "-o", "nowhere/scores.csv"], "nowhere"),
    "a summary without a file": (["DETECTOR", "DATA", "--json"], "--output"),
    "an fpr that cannot be reached": (["DETECTOR", "DATA", "--fpr", "0.001"], "0.001"),
    "no detector": (["DATA", "DATA"], "model.json"),
    "a model of another kind": (["DETECTOR", "DATA", "--model", "PIPE"], "kind"),
    "another model": (["DETECTOR", "DATA", "--arg", "hidden=5"], "levels.0"),
}


@pytest.mark.parametrize("name", SCORE_ERRORS)
def test_a_wrong_score_is_one_line(name: str, detector: Path, new: Path, tmp_path: Path) -> None:
    arguments, message = SCORE_ERRORS[name]
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    places = {"DETECTOR": str(detector), "DATA": str(new), "PIPE": str(tmp_path / "pipe")}
    assert message in failed("score", *(places.get(text, text) for text in arguments))


def test_a_folder_without_a_detector_is_a_clear_error(tmp_path: Path) -> None:
    assert "config.json" in failed("show", tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "[" * 100_000])
def test_a_damaged_recipe_is_a_clear_error(
    text: str, detector: Path, new: Path, tmp_path: Path
) -> None:
    for file in detector.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.json").write_text(text)
    assert "model.json" in failed("score", tmp_path, new)


@pytest.mark.parametrize("images", [{"size": [5, 5]}, {"size": [4, 5]}, {"mode": "RGB"}])
def test_images_of_another_size_than_the_detectors_are_refused_by_both_files(
    images: dict[str, object], detector: Path, new: Path, tmp_path: Path
) -> None:
    shutil.copytree(detector, tmp_path / "d")
    recipe = json.loads((detector / "model.json").read_text())
    recipe |= {"images": recipe["images"] | images, "model": "support.cli_cases:nothing"}
    (tmp_path / "d" / "model.json").write_text(json.dumps(recipe))
    for command in (["score"], ["watch", "--once"], ["verify"]):
        message = failed(command[0], tmp_path / "d", new, *command[1:])
        assert "of one size in model.json and config.json" in message  # and no model was made
        assert "(1, 4, 4)" in message


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    result = run("show", tmp_path, "--debug")
    assert isinstance(result.exception, FileNotFoundError)


def test_a_wrong_use_exits_with_2() -> None:
    assert run("score").exit_code == 2
    assert run("fit", "--sorcery").exit_code == 2


def test_bars_go_to_stderr_alone(detector: Path, new: Path) -> None:
    result = succeeded("score", detector, new, "--progress")
    assert "scoring" in result.stderr
    assert len(lines(result)) == 6
