"""QAPOLLOAdamW: the official name and constructor of APOLLO for int8 weights and 8-bit moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .optimizer import APOLLOAdamW


class QAPOLLOAdamW(APOLLOAdamW):
    """``APOLLOAdamW`` with the constructor and the defaults of apollo-torch's ``QAPOLLOAdamW``.

    In new code use ``APOLLOAdamW``, which trains int8 weights as well; ``quantize_model`` makes them.

    Args:
        params: as for ``APOLLOAdamW``.
        lr, betas, eps, weight_decay: as for ``APOLLOAdamW``, with the defaults of bitsandbytes' AdamW.
        optim_bits: 32 or 8; ``state_bits`` of ``APOLLOAdamW``.
        min_8bit_size: moments of fewer elements stay float32.
        scale_front, no_deprecation_warning: as for ``APOLLOAdamW``.
        amsgrad, args, percentile_clipping, block_wise, is_paged: accepted with their default values only.
        options: any other keyword of ``APOLLOAdamW``.

    Raises ValueError for one of the arguments that are accepted with their defaults only, and as ``APOLLOAdamW`` does.

    >>> import torch
    >>> layer = torch.nn.Linear(128, 64)
    >>> groups = [{"params": [layer.weight], "rank": 1, "scale_type": "tensor"}, {"params": [layer.bias]}]
    >>> QAPOLLOAdamW(groups, lr=1e-2, optim_bits=8).param_groups[0]["state_bits"]
    8
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        scale_front: bool = False,
        no_deprecation_warning: bool = True,
        **options: Any,
    ) -> None:
        for name, value, default, instead in (
            ("amsgrad", amsgrad, False, "APOLLO has no such variant"),
            ("args", args, None, "pass its fields as keywords"),
            ("percentile_clipping", percentile_clipping, 100, "clip with max_grad_norm"),
            ("block_wise", block_wise, True, "8-bit moments are blockwise"),
            ("is_paged", is_paged, False, "state stays on the weights' device"),
        ):
            if value != default:
                raise ValueError(f"Invalid {name}: {value!r} (allowed: {default!r}); {instead}")
        if optim_bits not in (8, 32):
            raise ValueError(f"Invalid optim_bits: {optim_bits!r} (allowed: 32 or 8)")
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            scale_front=scale_front,
            no_deprecation_warning=no_deprecation_warning,
            state_bits=optim_bits,
            min_8bit_size=min_8bit_size,
            **options,
        )
