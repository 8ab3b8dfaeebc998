"""Twins of the objectives, written from their formulas as slow loops in float64, and exact solutions of two toys.

The package never imports this file.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def naive_loss(log_pf, log_ref, log_flow, lam, lengths, delta=None) -> list[float]:
    """SubTB(λ) of each trajectory by a double loop over its sub-trajectories."""
    losses = []
    for row, n in enumerate(lengths.tolist()):
        total, weight_sum = 0.0, 0.0
        for i in range(n):
            for j in range(i + 1, n + 1):
                residual = float(log_flow[row, i]) - float(log_flow[row, j])
                for t in range(i, j):
                    residual += float(log_pf[row, t]) - float(log_ref[row, t])
                rho = residual**2 if delta is None else 2 * delta**2 * (math.sqrt(1 + (residual / delta) ** 2) - 1)
                total += lam ** (j - i) * rho
                weight_sum += lam ** (j - i)
        losses.append(total / weight_sum)
    return losses


def log_normal(x: Tensor, mean: Tensor | float, variance: float) -> Tensor:
    """Log-density of an isotropic Gaussian, summed over the last axis."""
    squared = (x - mean).square().sum(-1)
    return -squared / (2 * variance) - x.shape[-1] / 2 * math.log(2 * math.pi * variance)


@dataclass
class BridgeToy:
    """Toy A: pinned Brownian bridge as P_B, reward `exp(c - |x - m|² / 2v)`, unit steps; everything is Gaussian."""

    m: Tensor
    steps: int = 5
    v: float = 0.7
    s2: float = 0.4
    c: float = 1.3

    @property
    def log_z(self) -> float:
        return self.c + self.m.numel() / 2 * math.log(2 * math.pi * self.v)

    def marginal_variance(self, t: int) -> float:
        return (t / self.steps) ** 2 * self.v + self.s2 * t * (self.steps - t) / self.steps

    def log_reward(self, x: Tensor) -> Tensor:
        return self.c - (x - self.m).square().sum(-1) / (2 * self.v)

    def log_pb(self, states: Tensor) -> Tensor:
        """Of a batch of trajectories (batch, steps + 1, dim) from 0, shape (batch, steps)."""
        terms = [torch.zeros_like(states[:, 0, 0])]
        for t in range(2, self.steps + 1):
            terms.append(log_normal(states[:, t - 1], (t - 1) / t * states[:, t], self.s2 * (t - 1) / t))
        return torch.stack(terms, 1)

    def log_pf(self, states: Tensor) -> Tensor:
        terms = [log_normal(states[:, 1], self.m / self.steps, self.marginal_variance(1))]
        for t in range(1, self.steps):
            k, w, after = t / (t + 1), self.s2 * t / (t + 1), self.marginal_variance(t + 1)
            precision = 1 / after + k**2 / w
            mean = ((t + 1) / self.steps * self.m / after + k * states[:, t] / w) / precision
            terms.append(log_normal(states[:, t + 1], mean, 1 / precision))
        return torch.stack(terms, 1)

    def log_flow(self, states: Tensor) -> Tensor:
        flows = [torch.full_like(states[:, 0, 0], self.log_z)]
        for t in range(1, self.steps):
            flows.append(self.log_z + log_normal(states[:, t], t / self.steps * self.m, self.marginal_variance(t)))
        return torch.stack([*flows, self.log_reward(states[:, -1])], 1)


@dataclass
class RelativeToy:
    """Toy B: reference `N(s + b_t, s2_t)`, reward `exp(-|x - m|² / 2v)`; the posterior and its value are Gaussian."""

    m: Tensor
    drifts: Tensor
    variances: Tensor
    v: float = 0.7

    def reference_mean(self, states: Tensor) -> Tensor:
        return states[:, :-1] + self.drifts

    def log_ratio(self, states: Tensor) -> Tensor:
        """`log pi* - log pi_ref`, shape (batch, steps)."""
        terms = []
        for t, s2 in enumerate(self.variances.tolist()):
            after = self.v + float(self.variances[t + 1 :].sum())
            precision = 1 / s2 + 1 / after
            target = self.m - self.drifts[t + 1 :].sum(0)
            mean = ((states[:, t] + self.drifts[t]) / s2 + target / after) / precision
            posterior = log_normal(states[:, t + 1], mean, 1 / precision)
            terms.append(posterior - log_normal(states[:, t + 1], states[:, t] + self.drifts[t], s2))
        return torch.stack(terms, 1)

    def value(self, states: Tensor) -> Tensor:
        """`log E_ref[exp(-|x - m|² / 2v) | s_t]`, shape (batch, steps + 1)."""
        values = []
        for t in range(len(self.variances) + 1):
            spread = self.v + float(self.variances[t:].sum())
            gap = states[:, t] + self.drifts[t:].sum(0) - self.m
            values.append(-gap.square().sum(-1) / (2 * spread) + self.m.numel() / 2 * math.log(self.v / spread))
        return torch.stack(values, 1)
