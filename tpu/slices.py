"""TPU slices by name: what Cloud TPU, GKE and SkyPilot call them, and what they hold. One table for all launchers.

Sources: the pages of TPU v5e, v5p and v6e, "TPU software versions" and "Plan TPUs in GKE" in the documentation of
Google Cloud. Cloud's v5p-N counts TensorCores, two a chip; v5e-N and v6e-N count chips.
"""

import math
from typing import NamedTuple


class Generation(NamedTuple):
    accelerator: str  # prefix of --accelerator-type
    gke: str  # node label cloud.google.com/gke-tpu-accelerator
    machine: str  # prefix of the GKE machine type; the chips of a host follow
    runtime: str  # --runtime-version of a TPU VM for JAX
    hbm_gb: int  # nominal, per chip; a program gets a little less
    cores: int  # TensorCores per chip, as Cloud counts them in the slice's name


GENERATIONS = {
    "v5e": Generation("v5litepod", "tpu-v5-lite-podslice", "ct5lp-hightpu", "v2-alpha-tpuv5-lite", 16, 1),
    "v5p": Generation("v5p", "tpu-v5p-slice", "ct5p-hightpu", "v2-alpha-tpuv5", 95, 2),
    "v6e": Generation("v6e", "tpu-v6e-slice", "ct6e-standard", "v2-alpha-tpuv6e", 32, 1),
}


class Slice(NamedTuple):
    name: str
    topology: str  # chips along each axis
    hosts: int  # virtual machines; each runs one process

    @property
    def generation(self) -> Generation:
        return GENERATIONS[self.name.split("-")[0]]

    @property
    def chips(self) -> int:
        return math.prod(int(side) for side in self.topology.split("x"))

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts

    @property
    def accelerator(self) -> str:
        """--accelerator-type of Cloud TPU and --tpu-type of xpk; SkyPilot puts `tpu-` before it."""
        return f"{self.generation.accelerator}-{self.chips * self.generation.cores}"

    @property
    def machine(self) -> str:
        """Machine type of a GKE node pool."""
        return f"{self.generation.machine}-{self.chips_per_host}t"


SLICES = {
    name: Slice(name, topology, hosts)
    for name, topology, hosts in (
        ("v5e-4", "2x2", 1),
        ("v5e-8", "2x4", 1),
        ("v5e-16", "4x4", 4),
        ("v5p-8", "2x2x1", 1),
        ("v5p-16", "2x2x2", 2),
        ("v5p-128", "4x4x4", 16),
        ("v5p-512", "4x8x8", 64),
        ("v6e-4", "2x2", 1),
        ("v6e-8", "2x4", 1),
        ("v6e-64", "8x8", 16),
    )
}
