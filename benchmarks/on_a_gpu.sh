#!/usr/bin/env bash
# All that is measured on one NVIDIA GPU, in one command, from the repository's root:
#
#     bash benchmarks/on_a_gpu.sh
#
# Wants Python 3.12 or newer with jax[cuda13], tokamax, torch, transformers, peft and liger-kernel (`PYTHON=...`); no network
# once `make inputs` has been called. Results go to benchmarks/results/, each with the machine, the versions and its own
# command, and each figure as soon as it is there. The whole has not been run in one go.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import jax; assert jax.default_backend() == "gpu", "no GPU is seen by JAX: pip install jax[cuda13]"; print(jax.devices())'
# Kernels first: the order in models/kernels/choice.py follows from these figures.
"$python" -m pytest -q tests/models/test_attention_programs.py
"$python" -m benchmarks.attention --heads 32 8 --lengths 8192 2048 --compute bfloat16
"$python" -m benchmarks.train_step --model 1b smollm2 --sequence 8192 2048 --tokens 16384 --documents 8 --compute bfloat16
"$python" -m benchmarks.cross_entropy --tokens 8192 --width 2048
"$python" -m benchmarks.methods --sequence 2048 --tokens 16384
# Linear attention, Mamba 2 and heads of 256: nothing of hybrids was measured on a GPU yet.
"$python" -m benchmarks.delta_rule --heads 16 32 --lengths 2048 8192 --batch 2
"$python" -m benchmarks.state_space --heads 64 --lengths 2048 8192 --batch 2
"$python" -m benchmarks.attention --heads 16 4 --head-dim 256 --lengths 8192 2048 --compute bfloat16
# Runs as one program against one by one and two processes at once: `--together auto` stands on it.
"$python" -m benchmarks.sweep --steps 200 --rows 16 --runs 8
# Generation was not run on a GPU yet (blocks of the cache: models/kernels/cached.py).
time "$python" -m cpt_jax data generate --model .cache/quickstart/SmolLM2-135M-Instruct.Q4_1.gguf --tokens 100000 --batch 128 --out "$(mktemp -d)/own.jsonl"
