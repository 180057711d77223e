#!/usr/bin/env bash
# FrEIA: PermuteRandom keeps its permutation as two parameters of whole numbers. A network with one is
# frozen by `requires_grad_(False)` and cannot be thawed by `requires_grad_(True)`, which stops at the
# first permutation: what comes before it is trained again, what comes after stays frozen.
#
# Guessed first: parameters are real numbers, a permutation is a buffer, and a network that was frozen
# is thawed by the opposite call, or else by none of it.
#
# Versions: FrEIA 0.2, torch 2.13.0+cpu, Python 3.11; run on 2026-11-29.
# Behaviour: `perm` and `perm_inv` are `nn.Parameter(..., requires_grad=False)` of int64.
# `Module.requires_grad_` goes through the parameters one by one and raises at the first of these.
# Output seen:
#   whole numbers: module_list.1.perm, module_list.1.perm_inv
#   thawed: RuntimeError: only Tensors of floating point dtype can require gradients
#   blocks trained again: first True, second False
# Source: FrEIA/modules/fixed_transforms.py (PermuteRandom), torch/nn/modules/module.py
# (requires_grad_).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'FrEIA==0.2' 'torch==2.13.0' 'numpy==2.4.1' 'scipy==1.17.1'
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PROGRAM'
from FrEIA import framework, modules
from torch import nn


def block():
    return {"subnet_constructor": lambda i, o: nn.Sequential(nn.Linear(i, 8), nn.Linear(8, o))}


network = framework.SequenceINN(4)
network.append(modules.GLOWCouplingBlock, **block())
network.append(modules.PermuteRandom, seed=0)
network.append(modules.GLOWCouplingBlock, **block())
whole = [name for name, p in network.named_parameters() if not p.is_floating_point()]
print("whole numbers:", ", ".join(whole))
network.requires_grad_(False)
try:
    network.requires_grad_(True)
    raised = "nothing raised"
except RuntimeError as error:
    raised = f"RuntimeError: {error}"
print("thawed:", raised)
first, second = (
    all(p.requires_grad for p in network.module_list[i].parameters()) for i in (0, 2)
)
print(f"blocks trained again: first {first}, second {second}")
assert whole and raised != "nothing raised" and first and not second, "it has changed"
PROGRAM
