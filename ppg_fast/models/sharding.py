"""Tensors that may be in parts on several ranks, as FSDP2 leaves parameters."""

from typing import Any

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over ranks, in full."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def shard_like(tensor: Any, parameter: Tensor) -> Any:
    """``tensor``, which every rank holds whole, spread over ranks as ``parameter`` is, where it is and the two have one
    shape."""
    if (
        not hasattr(parameter, "device_mesh")
        or getattr(tensor, "shape", None) != parameter.shape
        or hasattr(tensor, "device_mesh")
    ):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
