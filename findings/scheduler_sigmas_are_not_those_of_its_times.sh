#!/usr/bin/env bash
# diffusers: KDPM2DiscreteScheduler's `sigmas[i]` is not the noise at `timesteps[i]`: every second
# time has another, two and more times as much. Its sample is scaled by the right one.
#
# Guessed first: `timesteps` and `sigmas` go together, one by one, as in Euler's, Heun's and LMS's
# schedulers, so that the noise of a step can be looked up by its index.
#
# Versions: diffusers 0.42.1, torch 2.13.0+cpu, Python 3.11; run on 2026-11-29.
# Behaviour: times are those of a step and of its middle in turn. `sigmas` has each step's twice; the
# middle's are in `sigmas_interpol`, which `scale_model_input` takes at every second step.
# Output seen (sigma / alpha of the training's level, and of `sigmas`):
#   time 999.0: 25.146 and 25.146
#   time 846.1: 10.632 and 4.496
#   time 666.0: 4.496 and 4.496
#   time 505.8: 2.336 and 1.214
#   time 333.0: 1.214 and 1.214
#   time 32.7: 0.188 and 0.029
#   Heun's scheduler, the largest difference: 0.0%
# Source: diffusers/schedulers/scheduling_k_dpm_2_discrete.py (set_timesteps, scale_model_input).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'diffusers==0.42.1' 'torch==2.13.0' 'numpy==2.4.1'
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PROGRAM'
import numpy as np
from diffusers import HeunDiscreteScheduler, KDPM2DiscreteScheduler


def pairs(kind):
    scheduler = kind()
    scheduler.set_timesteps(4)
    products = scheduler.alphas_cumprod.double().numpy()
    levels = np.sqrt((1 - products) / products)
    times = scheduler.timesteps.double().numpy()
    trained = np.exp(np.interp(times, np.arange(len(levels)), np.log(levels)))
    return times, trained, scheduler.sigmas[: len(times)].double().numpy()


times, trained, sigmas = pairs(KDPM2DiscreteScheduler)
for row in zip(times[:-1], trained, sigmas):
    print("time {:.1f}: {:.3f} and {:.3f}".format(*row))
_, right, same = pairs(HeunDiscreteScheduler)
# The last time is that of the last level, whatever its sigma.
print(f"Heun's scheduler, the largest difference: {abs(same[:-1] / right[:-1] - 1).max():.1%}")
middle = trained[1:-1:2] / sigmas[1:-1:2]
assert (middle > 1.5).all() and abs(same[:-1] / right[:-1] - 1).max() < 0.01, "it has changed"
PROGRAM
