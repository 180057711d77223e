#!/usr/bin/env bash
# torch 2.13.0: the first operation under any TorchDispatchMode imports all of torch._dynamo.
#
# Guess, written down before: a mode that only forwards costs a Python call an operation. It has no
# part in torch.compile, so nothing of the compiler is loaded.
#
# What happens: the first operation imports the compiler's front end, hundreds of modules and a second
# or more, in a process that compiles nothing. A service pays it in its first request. A subclass
# whose `_should_skip_dynamo` gives False (private, "a temporary measure") imports none of it.
#
# Why: torch/utils/_python_dispatch.py wraps each subclass's `__torch_dispatch__` by
# `torch._disable_dynamo`, and torch/_compile.py imports torch._dynamo when what it wraps is first
# called.
#
# Seen on 2026-11-28, torch 2.13.0+cpu, Python 3.11:
#   forwarding mode: 315 modules of torch more in 3 s (busy machine), torch._dynamo among them
#   mode that opts out: torch._dynamo is not loaded
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.2.6'
cat > "$folder/look.py" <<'PYTHON'
import sys
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

opts_out = sys.argv[1] == "out"


class Forwarding(TorchDispatchMode):
    if opts_out:

        @classmethod
        def _should_skip_dynamo(cls):
            return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


x = torch.ones(3)
before = set(sys.modules)
assert "torch._dynamo" not in before, "torch itself loads torch._dynamo now"
start = time.perf_counter()
with Forwarding():
    x + 1
new = [name for name in sys.modules if name not in before and name.startswith("torch")]
loaded = "torch._dynamo" in sys.modules
print(f"torch {torch.__version__}, mode {'opts out' if opts_out else 'forwards'}: ", end="")
print(f"{len(new)} modules of torch more in {time.perf_counter() - start:.1f} s, ", end="")
print(f"torch._dynamo loaded: {loaded}")
assert loaded == (not opts_out), "the behaviour has changed"
assert opts_out or len(new) > 100, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/look.py" in
"$folder/venv/bin/python" "$folder/look.py" out
