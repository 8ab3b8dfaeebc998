"""The values and gradients of torchgfn, where it is installed; `benchmarks/subtb` runs the same comparison with times."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lohp_peft.objectives import sub_trajectory_balance_loss

pytest.importorskip("gfn")


@pytest.fixture
def oracle():
    path = Path(__file__).parents[2] / "benchmarks" / "subtb" / "oracle.py"
    spec = importlib.util.spec_from_file_location("oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("lam", [0.3, 0.9, 1.0, 2.0])
@pytest.mark.parametrize("lengths", [[6] * 5, [6, 1, 4, 2, 5]])
@pytest.mark.usefixtures("float64")
def test_equals_torchgfn(oracle, lam, lengths):
    torch.manual_seed(0)
    log_pf, log_ref, log_flow = torch.randn(5, 6), torch.randn(5, 6), torch.randn(5, 7)
    results = []
    for loss_function in (sub_trajectory_balance_loss, oracle.torchgfn_loss):
        leaves = [x.clone().requires_grad_() for x in (log_pf, log_flow)]
        loss = loss_function(leaves[0], log_ref, leaves[1], lam=lam, lengths=torch.tensor(lengths))
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-12
