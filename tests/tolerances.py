"""Tolerances depend on the dtype alone; a test that needs more has found a bug or says why beside the number."""

import torch

TOL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
