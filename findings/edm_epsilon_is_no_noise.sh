#!/usr/bin/env bash
# diffusers: under `EDMEulerScheduler(prediction_type="epsilon")` the network does not predict the
# noise. The word only chooses the sign of c_out: both "epsilon" and "v_prediction" are EDM's own
# F, and one is minus the other. A network that predicts the noise perfectly denoises nothing.
#
# Guessed first: as with DDIM, DDPM and Euler, "epsilon" means that the network gives the noise of
# the sample, so that the scheduler's `pred_original_sample` is the data when it does.
#
# Versions: diffusers 0.42.1, torch 2.13.0+cpu, Python 3.11; run on 2026-11-29.
# Behaviour: `precondition_outputs` gives c_skip sample + c_out output, with c_out positive for
# "epsilon" and negative for "v_prediction". Of data x, noise n and angle a = atan(sigma /
# sigma_data), x comes back for the output sin(a) x / sigma_data - cos(a) n, and minus that.
# Output seen:
#   epsilon: the noise as output leaves an error of 1.49, sin(a) x / sigma_data - cos(a) n one of 0.00
#   v_prediction: the noise as output leaves an error of 0.95, minus the same one of 0.00
# Source: diffusers/schedulers/scheduling_edm_euler.py (precondition_outputs), and the same in
# scheduling_edm_dpmsolver_multistep.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'diffusers==0.42.1' 'torch==2.13.0' 'numpy==2.4.1'
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PROGRAM'
import math

import torch
from diffusers import EDMEulerScheduler

torch.manual_seed(0)
x, noise = 0.5 * torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)


def error(kind, output):
    """Of what the first step of a run takes for the data, as a share of the data's size."""
    scheduler = EDMEulerScheduler(sigma_max=1.0, prediction_type=kind)
    scheduler.set_timesteps(5)
    t, sigma = scheduler.timesteps[0], float(scheduler.sigmas[0])
    angle = math.atan(sigma / scheduler.config.sigma_data)
    scale = scheduler.config.sigma_data
    own = math.sin(angle) * x / scale - math.cos(angle) * noise
    noisy = x + sigma * noise
    scheduler.scale_model_input(noisy, t)
    found = scheduler.step({"noise": noise, "own": own, "minus": -own}[output], t, noisy)
    return float((found.pred_original_sample - x).norm() / x.norm())


for kind, its, said in (
    ("epsilon", "own", "sin(a) x / sigma_data - cos(a) n"),
    ("v_prediction", "minus", "minus the same"),
):
    wrong, right = error(kind, "noise"), error(kind, its)
    print(f"{kind}: the noise as output leaves an error of {wrong:.2f}, {said} one of {right:.2f}")
    assert wrong > 0.5 and right < 1e-3
PROGRAM
