"""Shared settings: one thread per worker (two torch processes on two cores otherwise fight), and reproducible hypothesis."""

import os

import hypothesis
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
hypothesis.settings.register_profile("cvxlib", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("cvxlib")
