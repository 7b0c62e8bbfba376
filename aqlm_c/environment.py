"""The environment variables that mean something to aqlm_c: what the code reads, `aqlm-c doctor` and README name."""

from __future__ import annotations

# By name: what it does, as a reader of `aqlm-c doctor` is told.
VARIABLES = {
    "AQLM_C_EXACT": "1: products without rounded tables, 0: with 16-bit tables for float32 too",
    "AQLM_C_GPUS": "GPUs that a build makes kernels for: 80, 90a, 100; all if it is not set",
    "AQLM_C_ISA": "instruction set of the C core",
    "AQLM_C_REQUIRE": "extensions without which a build stops: torch, cuda",
    "AQLM_C_TILES": "1: many rows on Hopper GPUs by a kernel that decodes each weight once",
}
