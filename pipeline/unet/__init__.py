"""Networks, and how they are laid over blocks; the only place that imports torch."""

import os

# Threads that wait give their core away: measured on two busy cores, a training step took 0.5 s so and 2.9 s spinning.
# Read once, when torch loads its OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
