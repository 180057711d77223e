#!/usr/bin/env bash
# diffusers: UNet2DConditionModel takes T2I-Adapter's features as `down_intrablock_additional_residuals`,
# said to be a tuple. A tuple raises; a list is emptied while the network runs. A forward hook that is
# given the keywords sees an empty list, and a second call with the same list is one without features,
# which raises nothing.
#
# Guessed first: a network leaves its arguments as they are, so that a hook with `with_kwargs=True`
# sees after the call what it was called with, and the same call gives the same again.
#
# Versions: diffusers 0.42.1, torch 2.13.0+cpu, Python 3.11; run on 2026-11-29.
# Behaviour: `forward` takes the features by `.pop(0)`, one for each block; of a list that is empty
# it takes none.
# Output seen:
#   a tuple: AttributeError: 'tuple' object has no attribute 'pop'
#   features before the call: 2, in the hook after it: 0
#   the same call again gives the same: False, what a call without features gives: True
# Source: diffusers/models/unets/unet_2d_condition.py (forward).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'diffusers==0.42.1' 'torch==2.13.0' 'numpy==2.4.1'
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PROGRAM'
import torch
from diffusers import UNet2DConditionModel

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    cross_attention_dim=8,
    attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval()
x, words = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
features = [torch.randn(1, 4, 8, 8), torch.randn(1, 8, 4, 4)]
seen = []


def hook(module, args, kwargs, output):
    seen.append(len(kwargs["down_intrablock_additional_residuals"] or ()))


unet.register_forward_hook(hook, with_kwargs=True)


@torch.no_grad()
def called(given):
    return unet(x, 10, words, down_intrablock_additional_residuals=given).sample


try:
    called(tuple(features))
    refused = "nothing raised"
except AttributeError as error:
    refused = f"AttributeError: {error}"
print("a tuple:", refused)
given = list(features)
first = called(given)
print(f"features before the call: {len(features)}, in the hook after it: {seen[-1]}")
again, without = called(given), called(None)
same, none = torch.equal(first, again), torch.equal(again, without)
print(f"the same call again gives the same: {same}, what a call without features gives: {none}")
assert refused != "nothing raised" and seen[0] == 0 and not same and none, "it has changed"
PROGRAM
