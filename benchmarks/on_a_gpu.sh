#!/usr/bin/env bash
# All that is measured on one GPU, in one command, from the repository's root:
#
#     bash benchmarks/on_a_gpu.sh
#
# Results go to benchmarks/results/, each with the machine, the versions and its own command. `make inputs` first, where there is a network.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
gpu='import jax; assert jax.default_backend() == "gpu", "no GPU is seen by JAX"; print(jax.devices())'
"$python" -c "$gpu" 2>/dev/null || "$python" -m pip install --quiet "jax[cuda12]"
"$python" -c "$gpu"
# Kernels first: the order in models/kernels/choice.py follows from these figures.
"$python" -m pytest -q tests/models/test_attention.py
"$python" -m benchmarks.attention
"$python" -m benchmarks.train_step --model smollm2 1b --sequence 2048 8192 --tokens 16384 --documents 8 --compute bfloat16
"$python" -m benchmarks.cross_entropy --tokens 8192 --width 2048
"$python" -m benchmarks.methods --sequence 2048 --tokens 16384
