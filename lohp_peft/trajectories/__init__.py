"""The data between the two stages: recorded trajectories, on disk."""

from lohp_peft.trajectories.dataset import TrajectoryDataset
from lohp_peft.trajectories.trajectory import Trajectory

__all__ = ["Trajectory", "TrajectoryDataset"]
