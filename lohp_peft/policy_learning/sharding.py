"""A policy whose parameters are shared out among processes (FSDP2), and tensors as a whole and in parts."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor

from lohp_peft.policy import LoHpPolicy


def shards_policy(accelerator: Accelerator) -> bool:
    """Whether the accelerator asks for a policy in parts, by FSDP2.

    Args:
        accelerator: That of the run.

    Raises:
        RuntimeError: Under FSDP 1, DeepSpeed and other ways of taking a model apart.
    """
    kind = accelerator.distributed_type
    apart = kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if apart and not accelerator.is_fsdp2:
        raise RuntimeError(
            "Policy learning takes a policy apart by FSDP2 (`fsdp_version: 2`) or not at all, got an accelerator of "
            f"type {kind.value}. Launch it with one of examples/accelerate_configs."
        )
    return apart


def sharded_copy(policy: LoHpPolicy, accelerator: Accelerator) -> LoHpPolicy:
    """A copy of a policy, whole or sharded, of which every process holds its part.

    `forward_policy` and `log_flow` gather the parameters for as long as they take, backward passes again. Gradients are
    summed over processes, not averaged, see `Processes`.

    Args:
        policy: The policy, the same in every process.
        accelerator: What joins the processes; of its FSDP settings none but the version counts.

    Raises:
        RuntimeError: When torch is too old to sum gradients.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise RuntimeError(f"A sharded policy needs a newer torch, got {torch.__version__}; it is tested with 2.13.")
    with torch.device("meta"):
        copy = LoHpPolicy(policy.config).to(policy.dtype)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for part in (*copy.forward_network.blocks, copy.log_flow_network, copy):
        shards = fully_shard(part, mesh=mesh, reshard_after_forward=True)
        shards.set_gradient_divide_factor(1.0)
        shards.set_force_sum_reduction_for_comms(True)  # gloo cannot average
    for name in ("forward_policy", "log_flow"):
        register_fsdp_forward_method(copy, name)
    copy.to_empty(device=accelerator.device)
    copy.load_state_dict(placed(policy.state_dict(), copy.state_dict()))
    return copy


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds only its part of the tensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor, in the same memory; one that is not sharded itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors in full; every process has to ask for those of the same names, in whatever order."""
    return {name: x.full_tensor() if is_sharded(x) else x for name, x in sorted(tensors.items())}


def place(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, the same in every process, sharded as `like` is, if that is sharded and has its shape."""
    if is_sharded(tensor) or not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def placed(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, each as the one of its name in `like`, see `place`."""
    return {name: place(tensor, like[name]) for name, tensor in tensors.items()}
