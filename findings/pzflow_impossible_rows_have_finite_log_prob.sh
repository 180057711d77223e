#!/usr/bin/env bash
# pzflow: a row outside the box that the flow was made for has probability zero, and a *finite*
# log-probability, -3.4028235e38. `isfinite` passes it, and one galaxy with a magnitude of 99, as
# catalogues mark what was not detected, makes the mean of a table a number of thirty-six digits.
#
# Guessed first: -inf, as the code says: NaN's are set "to negative infinity (i.e. zero probability)",
# and the latent gives -inf outside of its box.
#
# Versions: pzflow 4.0.0, jax 0.10.2, Python 3.11; run on 2026-11-29.
# Behaviour: `nan_to_num(x, nan=-inf)` replaces infinities too, by the largest finite numbers, unless
# it is given `neginf` as well; so the latent's own -inf becomes finite. A row slightly outside of the
# training range is none of these: the latent's box is a little wider than the data's.
# Output seen:
#   inside:  -5.0 to 10.3 nats
#   outside: -3.4028235e+38, finite True
#   mean of 100 rows, one of them outside: -3.4e+36
# Source: pzflow/flow.py (Flow._log_prob), pzflow/distributions.py (Uniform.log_prob).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'pzflow==4.0.0' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6' 'pandas==3.1.1'
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PROGRAM'
import numpy as np
from pzflow.examples import get_example_flow, get_galaxy_data

flow, rows = get_example_flow(), get_galaxy_data()
outside = rows[:1].copy()
outside["u"] = 99.0
inside = np.asarray(flow.log_prob(rows[:99]))
[found] = np.asarray(flow.log_prob(outside))
print(f"inside:  {inside.min():.1f} to {inside.max():.1f} nats")
print(f"outside: {found}, finite {np.isfinite(found)}")
print(f"mean of 100 rows, one of them outside: {np.append(inside, found).mean():.1e}")
assert np.isfinite(inside).all(), "galaxies of its own have none"
assert found == np.finfo(np.float32).min, "the behaviour has changed"
PROGRAM
