#!/usr/bin/env bash
# gpytorch: the first call of an ApproximateGP writes its parameters, at random, also where it is a
# prediction in eval mode under `torch.no_grad()`. The same weights then predict otherwise each time
# that a model is made of them.
#
# Guessed first: a prediction of a model in eval mode leaves its parameters as they are, and two
# models of the same parameters predict the same.
#
# Versions: gpytorch 1.15.2, linear_operator 0.6.1, torch 2.13.0+cpu, Python 3.11; run on 2026-11-29.
# Behaviour: while the buffer `variational_params_initialized` is zero, whatever calls the strategy
# sets the variational distribution to the prior at the inducing points, with noise of
# `mean_init_std` on the mean. A state that was saved before any call holds the zero too, and so
# everyone who loads it gets weights of their own.
# Output seen:
#   written by a prediction: variational_mean
#   two models of one saved state predict the same: False
#   after a call before saving: True, written: nothing
# Source: gpytorch/variational/_variational_strategy.py (__call__), and in
# gpytorch/variational/cholesky_variational_distribution.py initialize_variational_distribution.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'gpytorch==1.15.2' 'linear_operator==0.6.1' 'torch==2.13.0' 'numpy==2.4.1'
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PROGRAM'
import gpytorch
import torch

torch.manual_seed(0)
x = torch.linspace(-2, 2, 5)[:, None]


class Process(gpytorch.models.ApproximateGP):
    def __init__(self):
        points = torch.linspace(-1, 1, 4)[:, None]
        chosen = gpytorch.variational.CholeskyVariationalDistribution(4)
        super().__init__(gpytorch.variational.VariationalStrategy(self, points, chosen))
        self.mean = gpytorch.means.ConstantMean()
        self.kernel = gpytorch.kernels.RBFKernel()

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


@torch.no_grad()
def predicted(model):
    return model.eval()(x).mean


def loaded(state):
    model = Process()
    model.load_state_dict(state)
    return model


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def written(state, model):
    names = (n for n, p in model.named_parameters() if not torch.equal(p, state[n]))
    return ", ".join(name.rpartition(".")[2] for name in names) or "nothing"


first = Process()
new = copied(first)
predicted(first)
changed = written(new, first)
same = torch.equal(predicted(loaded(new)), predicted(loaded(new)))
used = copied(first)
again = loaded(used)
later = torch.equal(predicted(again), predicted(loaded(used)))
print("written by a prediction:", changed)
print("two models of one saved state predict the same:", same)
print(f"after a call before saving: {later}, written: {written(used, again)}")
assert changed != "nothing" and not same and later, "it has changed"
PROGRAM
