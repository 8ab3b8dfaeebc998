"""torchgfn's SubTB(λ) on given tensors: its own `loss`, with the networks and the environment replaced by values."""

from types import SimpleNamespace

import torch
from gfn.gflownet import SubTBGFlowNet
from gfn.gflownet.losses import SquaredLoss
from torch import Tensor


class TorchgfnSubTB(SubTBGFlowNet):
    """`SubTBGFlowNet(weighting="geometric_within")` for trajectories of the given lengths.

    torchgfn ends a trajectory by an exit action; here the last transition plays that part, so that states and rewards
    are those of a trajectory of fixed length. torchgfn has time first: `log_ratio` and `log_flow` (time, batch),
    `log_reward` (batch,). Needs a default dtype equal to that of the tensors.
    """

    def __init__(self, lengths: Tensor, time: int, lam: float):
        torch.nn.Module.__init__(self)  # not that of SubTBGFlowNet, which asks for networks
        self.weighting, self.lamda, self.loss_fn = "geometric_within", lam, SquaredLoss()
        self.debug, self.log_reward_clip_min = False, -float("inf")
        step = torch.arange(time)[:, None]
        self._padding = step >= lengths if bool((lengths < time).any()) else None
        self._trajectories = _Trajectories(
            terminating_idx=lengths,
            max_length=time,
            batch_size=len(lengths),
            actions=SimpleNamespace(is_exit=step == lengths - 1),
        )

    def __call__(self, log_ratio: Tensor, log_flow: Tensor, log_reward: Tensor) -> Tensor:
        if self._padding is not None:
            log_ratio = log_ratio.masked_fill(self._padding, 0.0)
            log_flow = log_flow.masked_fill(self._padding, -float("inf"))
        self._log_ratio, self._log_flow = log_ratio, log_flow
        return self.loss(object(), self._trajectories, log_rewards=log_reward)

    def get_pfs_and_pbs(self, trajectories, recalculate_all_logprobs=True):
        return self._log_ratio, torch.zeros_like(self._log_ratio)

    def calculate_log_state_flows(self, env, trajectories, log_pf_trajectories):
        return self._log_flow


class _Trajectories(SimpleNamespace):
    def __len__(self):
        return self.batch_size


def torchgfn_loss(log_pf: Tensor, log_ref: Tensor, log_flow: Tensor, *, lam: float, lengths: Tensor) -> Tensor:
    """The same value as `sub_trajectory_balance_loss`, with its arguments: batch first, reward as the last flow."""
    log_reward = log_flow.gather(1, lengths[:, None]).squeeze(1)
    return TorchgfnSubTB(lengths, log_pf.shape[1], lam)((log_pf - log_ref).T, log_flow[:, :-1].T, log_reward)
