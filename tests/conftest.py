"""Every test runs on 8 virtual CPU devices, in fp32, and refuses silent broadcasting between ranks."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # none, or make's; the commands would use the user's own

# What takes time here is compiling: code that LLVM does not optimise has the same graph, the same numbers but for their
# last bits, and is there in two thirds of the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import torch

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
torch.set_num_threads(1)
