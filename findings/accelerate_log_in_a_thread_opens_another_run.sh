#!/usr/bin/env bash
# accelerate: `accelerator.log` from a thread of one's own returns as ever, and with MLflow writes into
# another run. It opens that run itself, under a name of its own, in the experiment "Default", and
# nothing ever ends it: the figures are not in the run that the trackers were started for.
#
# Guessed first: a tracker keeps the run that `init_trackers` started and logs into it, from wherever
# it is called; `tracker.tracker` is that very run.
#
# Versions: accelerate 1.15.0, mlflow-skinny 3.17.2, torch 2.13.0+cpu, Python 3.11; run on 2026-11-29.
# Behaviour: the tracker keeps the run and never uses it to log. `mlflow.log_metrics` asks for the
# active run, of which each thread has a stack of its own, and starts one where there is none. Its
# experiment is the thread's too. `mlflow.start_run(run_id=...)` in the thread mends it.
# Output seen:
#   experiment p:       FINISHED {'loss': 1.0}
#   experiment Default: RUNNING {'score': 2.0}
# Source: accelerate/tracking.py (MLflowTracker.log), mlflow/tracking/fluent.py
# (_get_or_start_run, _active_run_stack).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'accelerate==1.15.0' 'torch==2.13.0' 'numpy==2.4.1' \
  'mlflow-skinny==3.17.2' 'sqlalchemy==2.1.9' 'alembic==1.20.1' 'pandas==3.1.1'
cd "$folder"
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true CUDA_VISIBLE_DEVICES=
"$folder/venv/bin/python" -W ignore - 2> errors.txt <<'PROGRAM' || { cat errors.txt; exit 1; }
import threading

import mlflow
from accelerate import Accelerator

mlflow.set_tracking_uri("sqlite:///runs.db")
accelerator = Accelerator(cpu=True, log_with="mlflow", project_dir=".")
accelerator.init_trackers("p")
accelerator.log({"loss": 1.0}, step=0)
thread = threading.Thread(target=accelerator.log, args=({"score": 2.0},), kwargs={"step": 1})
thread.start()
thread.join()
accelerator.end_training()
found = {}
for experiment in mlflow.search_experiments(order_by=["experiment_id DESC"]):
    for run in mlflow.search_runs([experiment.experiment_id], output_format="list"):
        found[experiment.name] = (run.info.status, run.data.metrics)
        print(f"{'experiment ' + experiment.name + ':':<19} {run.info.status} {run.data.metrics}")
assert found["p"] == ("FINISHED", {"loss": 1.0}), "the behaviour has changed"
assert found["Default"] == ("RUNNING", {"score": 2.0}), "the behaviour has changed"
PROGRAM
