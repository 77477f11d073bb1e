#!/usr/bin/env bash
# The experiments on the small base, in one command on one GPU, from the repository's root:
#
#     bash experiments/on_a_gpu.sh
#
# One sweep after the other (five at once were too many for a GPU, experiments/README.md); each goes on where it stopped.
# Ends with the tables of experiments/README.md, its plots, and figures in experiments/results/.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
"$python" -m experiments.small_base_inputs
[ -e .cache/small-base/base/config.json ] || "$python" -m experiments.small_base
"$python" -m cpt_jax sweep experiments.replay_share:chinese --workdir runs/replay-chinese
"$python" -m cpt_jax sweep experiments.replay_share:code --workdir runs/replay-code
# A model of this size fills a GPU alone.
"$python" -m configs.quickstart_inputs
"$python" -m cpt_jax sweep experiments.replay_share:smollm2 --together never --workdir runs/replay-smollm2
"$python" -m cpt_jax sweep experiments.what_keeps:chinese --exports --workdir runs/keeps
"$python" -m cpt_jax sweep experiments.growing:chinese --workdir runs/growing
"$python" -m cpt_jax sweep experiments.rewarming:chinese --workdir runs/rewarming
"$python" -m experiments.answers runs/{replay-chinese,replay-code,keeps,growing,rewarming}
"$python" -m experiments.answers
"$python" -m experiments.replay_law
