#!/usr/bin/env bash
# diffusers: `B.from_config(a.config)` leaves out whatever `a` has by default. Of a scheduler that was
# made in code it makes one of other noise levels; of the same one, saved and loaded, it does not.
#
# Guessed first: a configuration holds all values, and so a scheduler of another kind made of it has
# the same betas, whether the first was just made or comes from a folder.
#
# Versions: diffusers 0.42.1, torch 2.13.0+cpu, Python 3.11; run on 2026-11-29.
# Behaviour: what was not given to the constructor is listed in the configuration's
# `_use_default_values`, and `from_config` drops these names, so that the defaults of the new kind
# come in their place. `save_pretrained` writes the values without that list. LCM's betas are those
# of Stable Diffusion, DDIM's are not.
# Output seen:
#   LCM in code:             0.00085 0.012 scaled_linear, alphas_cumprod to 4.66e-03
#   DDIM of it:              0.0001 0.02 linear, alphas_cumprod to 4.04e-05
#   DDIM of the saved one:   0.00085 0.012 scaled_linear, alphas_cumprod to 4.66e-03
# Source: diffusers/configuration_utils.py (register_to_config, extract_init_dict, to_json_string).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'diffusers==0.42.1' 'torch==2.13.0' 'numpy==2.4.1'
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PROGRAM'
from diffusers import DDIMScheduler, LCMScheduler


def told(name, scheduler):
    config, last = scheduler.config, float(scheduler.alphas_cumprod[-1])
    betas = (config.beta_start, config.beta_end, config.beta_schedule)
    print(f"{name:<24} {' '.join(map(str, betas))}, alphas_cumprod to {last:.2e}")
    return betas


made = LCMScheduler()
made.save_pretrained("saved")
first = told("LCM in code:", made)
of_it = told("DDIM of it:", DDIMScheduler.from_config(made.config))
loaded = LCMScheduler.from_pretrained("saved")
of_saved = told("DDIM of the saved one:", DDIMScheduler.from_config(loaded.config))
assert of_saved == first != of_it, "the behaviour has changed"
PROGRAM
