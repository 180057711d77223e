"""Spoken digits, which the paper leaves open: models of five speakers, shown a sixth and changes.

The recordings are those of the Free Spoken Digit Dataset (3 000 WAV files of 8 kHz, six speakers,
CC BY-SA 4.0, github.com/Jakobovski/free-spoken-digit-dataset), of which none is committed here. A
recording becomes what its half second in the middle gives: a spectrogram of 32 bands of frequency
and 32 steps of time, in decibels below its loudest cell, as an image of 256 values. The models are
those of `benchmarks.detection.zoo` with few steps. Changed are the test recordings themselves:
played backwards, faster, with noise, and with the low frequencies cut off.

    python -m benchmarks.detection.audio --recordings FOLDER --train runs/audio
    python -m benchmarks.detection.audio --recordings FOLDER --json benchmarks/results/audio.json
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import ShortTimeFFT, butter, resample_poly, sosfiltfilt
from torch import Tensor

from benchmarks.detection import cases, protocol, trained
from benchmarks.detection.cases import Case
from benchmarks.detection.protocol import Sizes

Wave: TypeAlias = NDArray[np.float64]

#: Samples a second, of a spectrogram, of its windows and between them, and its sides.
RATE, LENGTH, WINDOW, HOP, SIDE = 8_000, 4_096, 256, 128, 32

#: Decibels below the loudest cell that are told from silence.
RANGE = 60.0

#: Who is never trained on; the share of a model's steps; noise in decibels below the recording.
OTHER, SHARE, SNR = "theo", 0.2, 10.0

SIZES = Sizes(fit=350, calibration=350, test=350, ood=300)

WHERE = (
    "Expected WAV files named DIGIT_SPEAKER_NUMBER.wav, 8 kHz, in {}: the folder `recordings` of "
    "github.com/Jakobovski/free-spoken-digit-dataset; name it by --recordings. --quick needs none."
)


def backwards(wave: Wave) -> Wave:
    return wave[::-1].copy()


def faster(wave: Wave) -> Wave:
    """By a quarter, and higher by as much."""
    found: Wave = resample_poly(wave, 4, 5)
    return found


def noisy(wave: Wave) -> Wave:
    generator = np.random.default_rng(len(wave))
    scale = np.sqrt(np.mean(wave**2) / 10 ** (SNR / 10))
    found: Wave = wave + scale * generator.normal(size=len(wave))
    return found


def without_bass(wave: Wave) -> Wave:
    """Below 500 Hz, as of a poor microphone."""
    found: Wave = sosfiltfilt(butter(4, 500, "high", fs=RATE, output="sos"), wave)
    return found


CHANGES: dict[str, Callable[[Wave], Wave]] = {
    "backwards": backwards,
    "a quarter faster": faster,
    "noise, 10 dB below": noisy,
    "no bass": without_bass,
}


def read(folder: Path) -> dict[str, list[Wave]]:
    """Recordings by speaker, in the order of their names.

    Raises:
        FileNotFoundError: There are none.
        ValueError: One is of another rate, or not mono.
    """
    files = sorted(folder.glob("*_*_*.wav"))
    if not files:
        raise FileNotFoundError(WHERE.format(folder))
    found: dict[str, list[Wave]] = {}
    for file in files:
        rate, samples = wavfile.read(file)
        if rate != RATE or samples.ndim != 1:
            raise ValueError(f"Expected mono at {RATE} Hz, got {samples.shape} at {rate}: {file}.")
        found.setdefault(file.stem.split("_")[1], []).append(samples.astype(np.float64))
    return found


def middle(wave: Wave) -> Wave:
    """So much of it, with silence around what is shorter."""
    short = max(0, LENGTH - len(wave))
    padded = np.pad(wave, (short // 2, short - short // 2))
    start = (len(padded) - LENGTH) // 2
    return padded[start : start + LENGTH]


def spectrogram(wave: Wave) -> NDArray[np.uint8]:
    """Power by band (low ones below) and time, in steps of a 255th of `RANGE`: (32, 32)."""
    window = np.hanning(WINDOW)
    power = ShortTimeFFT(window, HOP, RATE).spectrogram(middle(wave), p0=0, p1=SIDE)
    bands = power[1:].reshape(SIDE, -1, SIDE).mean(1)[::-1]
    below = 10 * np.log10(np.maximum(bands, 1e-12) / max(bands.max(), 1e-12))
    found: NDArray[np.uint8] = (255 * np.clip(1 + below / RANGE, 0, 1)).round().astype(np.uint8)
    return found


def images(waves: list[Wave]) -> Tensor:
    """Their spectrograms: uint8, (N, 1, 32, 32)."""
    return torch.from_numpy(np.stack([spectrogram(wave) for wave in waves]))[:, None]


def case(recordings: Mapping[str, list[Wave]], sizes: Sizes = SIZES) -> Case:
    """Models of all speakers but one, and what they are shown."""
    known = [wave for name, waves in recordings.items() if name != OTHER for wave in waves]
    known = [known[i] for i in np.random.default_rng(0).permutation(len(known))]
    test, known = known[: sizes.test], known[sizes.test :]
    held_out = images(known[: sizes.fit + sizes.calibration])
    others = {"another speaker": images(recordings[OTHER])} | {
        name: images([change(wave) for wave in test]) for name, change in CHANGES.items()
    }
    seen = protocol.unlike(images(known[sizes.fit + sizes.calibration :]), held_out)
    sets = protocol.split(seen, held_out, images(test), others, sizes)
    return Case("spoken digits", {"train": trained.drawn(seen, len(seen)), **sets}, SHARE)


def main(
    quick: cases.Quick = False,
    recordings: Annotated[Path, typer.Option(help="Folder of WAV files.")] = Path("data"),
    model: cases.Models = None,
    train: cases.Training = None,
    folder: cases.Folder = Path("runs/audio/rows"),
    json: cases.Output = None,
) -> None:
    if quick:
        cases.run_quick(json)
        return
    found, names = case(read(recordings)), model or list(cases.of_zoo())
    cases.run([found], names, train, folder, json)


if __name__ == "__main__":
    typer.run(main)
