"""What the command line reads: regular files, of named formats, of sizes that are checked."""

import contextlib
import io
import json
import os
import re
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from support.cli_cases import grey_images, write_images
from typer.testing import CliRunner, Result

from ood_monitor.cli import app, data
from ood_monitor.cli.files import open_regular
from ood_monitor.cli.images import FORMATS, MOST_PIXELS, ImageFormat
from ood_monitor.cli.tables import read_rows

IMAGES = ImageFormat("L", (4, 4))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fitted")
    held_out = write_images(root / "held_out", grey_images(240))
    run("fit", "support.cli_cases:flow", held_out, root / "detector")
    return root / "detector"


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code in (0, 3, 4), result.output
    return result


# Files that are none


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's address is short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere.png")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


#: How they are made, and what is said of them.
OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (a_pipe, "got a named pipe"),
    "socket": (a_socket, "got a socket"),
    "device": (a_device, "got a device"),
    "nothing": (a_link_to_nothing, "No such file"),
    "itself": (a_link_to_itself, "symbolic links"),
}


@pytest.mark.parametrize("kind", [*OTHERS, "folder"])
def test_only_a_regular_file_is_opened(kind: str, tmp_path: Path) -> None:
    make, told = OTHERS.get(kind, (Path.mkdir, "got a folder"))
    make(tmp_path / "x.png")
    with pytest.raises((OSError, ValueError), match=told) as raised:
        open_regular(tmp_path / "x.png", 100)
    assert str(tmp_path / "x.png") in str(raised.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123")
    with open_regular(tmp_path / "x", 3) as file:
        assert file.read() == b"123"
    with pytest.raises(ValueError, match="at most 2 bytes, got 3"):
        open_regular(tmp_path / "x", 2)


def test_a_linked_file_is_read(tmp_path: Path) -> None:
    (write_images(tmp_path / "there", grey_images(1)) / "0000.png").rename(tmp_path / "file")
    (tmp_path / "x.png").symlink_to("file")
    assert IMAGES.read(tmp_path / "x.png").shape == (1, 4, 4)


@pytest.mark.parametrize("command", ["watch", "score"])
def test_what_is_no_file_is_an_unreadable_sample_and_waited_for_by_nobody(
    command: str, detector: Path, tmp_path: Path
) -> None:
    inbox = write_images(tmp_path / "inbox", grey_images(5, seed=1))
    for kind, (make, _) in OTHERS.items():
        make(inbox / f"{kind}.png")
    (inbox / "folder.png").mkdir()  # not a sample, but where some may be
    options = ["--once", "--json"] if command == "watch" else []
    result = run(command, detector, inbox, *options)
    for kind, (_, told) in OTHERS.items():
        assert re.search(rf"unreadable: .*{told}.*{kind}\.png", result.stderr), result.stderr
    if command == "watch":
        found = json.loads(result.stdout.splitlines()[-1])["summary"]
        assert (found["samples_seen"], found["unreadable"]) == (10, 5)
    else:
        rows = [json.loads(line) for line in result.stdout.splitlines()]
        assert sorted(row["id"] for row in rows if not row["valid"]) == sorted(
            f"{kind}.png" for kind in OTHERS
        )


def test_a_link_that_leads_somewhere_at_last_is_a_new_sample(
    detector: Path, tmp_path: Path
) -> None:
    inbox = write_images(tmp_path / "inbox", grey_images(3))
    (inbox / "late.png").symlink_to(tmp_path / "late")
    arguments = ("watch", detector, inbox, "--once", "--state", tmp_path / "state", "--json")
    seen = []
    for _ in range(4):
        seen.append(json.loads(run(*arguments).stdout.splitlines()[-1])["summary"]["samples_seen"])
        if len(seen) == 2:
            (inbox / "0000.png").rename(tmp_path / "late")
    assert seen == [4, 4, 5, 5]


@pytest.mark.parametrize("name", ["pipe.npz", "pipe.csv", "pipe.jsonl", "pipe.parquet"])
def test_no_other_file_may_be_a_pipe_either(name: str, detector: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    arguments = ["score", str(detector), str(tmp_path / name)]
    if not name.endswith("npz"):
        arguments = ["report", str(detector), str(tmp_path / "r.html")]
        arguments += ["--scores", str(tmp_path / name)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "got a named pipe" in result.stderr


def test_a_recipe_may_be_no_pipe(detector: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.json")
    result = CliRunner().invoke(app, ["score", str(tmp_path), str(detector)])
    assert (result.exit_code, "got a named pipe" in result.stderr) == (1, True)


# Images


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_is_named_is_read(kind: str, tmp_path: Path) -> None:
    image = np.full((4, 4), 200, np.uint8)
    Image.fromarray(image).save(tmp_path / "x", kind)
    assert abs(IMAGES.read(tmp_path / "x") * 255 - 200).max() < 3


@pytest.mark.parametrize("kind", ["EPS", "ICO", "PCX", "TGA", "SGI", "DDS"])
def test_no_other_format_is_decoded_whatever_the_file_is_called(kind: str, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).convert("RGB").save(tmp_path / "x.png", kind)
    with Image.open(tmp_path / "x.png") as known:
        assert known.format == kind
    with pytest.raises(ValueError, match=rf"x.png \({', '.join(FORMATS)}\), got something else"):
        IMAGES.read(tmp_path / "x.png")


def png_of(width: int, height: int) -> bytes:
    """A header that says so, before data that are none."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", b"no data"), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("size", "resize", "told"),
    [
        ((5, 4), False, "4 x 4 pixels, got 4 x 5"),
        ((9000, 9000), False, "4 x 4 pixels, got 9000 x 9000"),
        ((9000, 9000), True, f"at most {MOST_PIXELS:,} pixels, got 9,000 x 9,000"),
        ((10_000, 10_000), True, "DecompressionBombWarning"),
        ((20_000, 20_000), True, "DecompressionBombError"),
    ],
)
def test_the_size_is_asked_for_before_the_data(
    size: tuple[int, int], resize: bool, told: str, tmp_path: Path
) -> None:
    (tmp_path / "x.png").write_bytes(png_of(*size))
    with pytest.raises(ValueError, match=told):
        ImageFormat("L", (4, 4), resize).read(tmp_path / "x.png")


def test_the_size_of_the_first_image_is_not_taken_from_a_bomb(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png_of(9000, 9000))
    with pytest.raises(ValueError, match="at most"):
        data.open_samples(tmp_path, ImageFormat())


FAILURES = [
    MemoryError, OverflowError, RecursionError, EOFError, KeyError, AssertionError, struct.error,
    zlib.error, SyntaxError, Image.DecompressionBombError, TypeError, NotImplementedError,
]  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_whatever_a_decoder_raises_is_an_unreadable_sample(
    failure: type[Exception], detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = write_images(tmp_path / "inbox", grey_images(1, seed=1))
    for name in ("0001.png", "0002.png"):
        marked = PngImagePlugin.PngInfo()
        marked.add_text("marked", "yes")
        Image.fromarray(grey_images(1)[0]).save(inbox / name, pnginfo=marked)
    whole = PngImagePlugin.PngImageFile.load

    def load(image: Any) -> Any:
        return _raise(failure("why")) if "marked" in image.info else whole(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    result = run("watch", detector, inbox, "--once", "--json")
    found = json.loads(result.stdout.splitlines()[-1])["summary"]
    assert (found["samples_seen"], found["unreadable"]) == (3, 2)
    assert len(re.findall(rf"000[12]\.png.*{failure.__name__}.*why", result.stderr)) == 2


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_image_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4), np.uint8)).save(file, kind)
    draw = np.random.default_rng(1)
    read = 0
    for _ in range(100):
        content = bytearray(file.getvalue())
        for at in draw.integers(0, len(content), 3):
            content[at] = draw.integers(256)
        (tmp_path / "x.png").write_bytes(content)
        with contextlib.suppress(ValueError):
            IMAGES.read(tmp_path / "x.png")
            read += 1
    assert read < 100


# Arrays


def npz(path: Path, header: dict[str, Any], content: bytes) -> Path:
    """An array with this header and content."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"fortran_order": False} | header)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", file.getvalue() + content)
    return path


@pytest.mark.parametrize(
    ("header", "content", "told"),
    [
        ({"shape": (2**50,), "descr": "<f8"}, b"12345678", "9,007,199,254,740,992 bytes"),
        ({"shape": (2, 4, 4), "descr": "|u1"}, bytes(31), "Expected 32 bytes .* got 31"),
        ({"shape": (2, 4, 4), "descr": "|u1"}, bytes(33), "Expected 32 bytes .* got 33"),
        ({"shape": (1,), "descr": "|O"}, b"12345678", "Expected numbers, got an array of object"),
        ({"shape": (1,), "descr": "<U2"}, b"12345678", "Expected numbers, got an array of <U2"),
        ({"shape": (2, 4, 4), "descr": "<f8"}, bytes(256), "at most 200 bytes, half of this mac"),
    ],
)
def test_what_an_array_says_of_itself_is_compared_before_there_is_memory_for_it(
    header: dict[str, Any],
    content: bytes,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = npz(tmp_path / "x.npz", header, content)
    if "half" in told:
        monkeypatch.setattr(data, "_most_bytes", lambda: 200)
    with pytest.raises(ValueError, match=told):
        data.open_samples(file, ImageFormat())


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    for name, content in (("x.txt", b"text"), ("x.npy", b"text")):
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr(name, content)
        with pytest.raises(ValueError, match=r"x\.npz: "):
            data.open_samples(tmp_path / "x.npz", ImageFormat())


def test_a_stored_dataset_is_decoded_by_the_same_gate(detector: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = sorted(write_images(tmp_path / "images", grey_images(4, seed=1)).iterdir())
    other = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(other, "EPS")
    contents = [files[0].read_bytes(), other.getvalue(), b"no image", files[1].read_bytes()]
    rows = {"image": [{"bytes": content, "path": None} for content in contents]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    result = run("score", detector, tmp_path / "data")
    found = [json.loads(line)["valid"] for line in result.stdout.splitlines()]
    assert found == [True, False, False, True]
    assert result.stderr.count("got something else") == 2


# Tables

ROW = {
    "id": "a", "score": 1.0, "p_value": 0.5, "log_likelihood": -2.0, "flagged": False,
    "valid": True, "top_layer": "w", "top_z": -1.5,
}  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        json.dumps(ROW | {"score": float("inf")}),
        json.dumps(ROW | {"p_value": float("nan")}),
        json.dumps(ROW | {"score": "high"}),
        json.dumps({"id": "a"}),
        "[" * 100_000,
        "1" * 5000,
        "\xff",
        "[]",
    ],
)
def test_rows_that_score_did_not_write_are_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(f"{json.dumps(ROW)}\n{line}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"Expected what `score` wrote in .*s\.jsonl, got"):
        read_rows(tmp_path / "s.jsonl")


def test_a_cell_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(f'{",".join(ROW)}\n"{"x" * 200_000}')
    with pytest.raises(ValueError, match=r"Expected what `score` wrote in .*s\.csv, got Error"):
        read_rows(tmp_path / "s.csv")


def test_a_table_is_not_written_through_a_link(detector: Path, tmp_path: Path) -> None:
    inbox = write_images(tmp_path / "inbox", grey_images(2))
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "s.csv").symlink_to("mine.txt")
    run("score", detector, inbox, "--output", tmp_path / "s.csv")
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert len(read_rows(tmp_path / "s.csv")) == 2
