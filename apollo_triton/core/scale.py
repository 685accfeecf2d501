"""``scale="auto"``: the scale at which a low-rank update trains as AdamW's does, so that AdamW's rate carries over.

The only place that turns a group's ``scale`` into a number. Both backends call ``scale_of`` when they lay out matrices.
"""

from __future__ import annotations

from .geometry import Geometry
from .settings import Settings

# The squared norm of an update with "auto" over that of AdamW's. AdamW's N averages the noise of about 1 / (1 - b1)
# gradients away, so that its elements are rho in size, with rho from 1, for gradients without noise, down to
# sqrt((1 - b1) / (1 + b1)) = 0.23, for noise alone. APOLLO's update points along the current gradient, noise and all:
# at AdamW's norm it goes rho times as far as AdamW along the mean of the gradients, and to go as far it needs the norm
# 1 / rho. rho was 0.27 to 0.32 over AdamW's runs of bench/rates.py, for which the constant would be 10 to 14. 8 keeps a
# distance from where the noise is too much: at 4 a run of 600 steps ended 1 to 4 % behind AdamW at AdamW's best rate,
# at 12 a factor for each tensor is worse than at 8 in a short one, at 16 it diverges at twice that rate.
AUTO_CONSTANT = 8.0
# 1/|R_c|^2 has a mean from three numbers a channel on.
LEAST_CHANNEL_RANK = 3


def auto_scale(width: int, rank: int, scale_type: str) -> float:
    """The ``scale`` of a matrix of projected ``width`` for which |update| is sqrt(AUTO_CONSTANT) times AdamW's.

    Adam's direction N of n numbers has |N|^2 of about rho^2 n, where rho depends on how much of a gradient is noise and
    not on n. So AdamW's update of a channel of ``width`` numbers has rho^2 width. That of APOLLO is N of ``rank``
    numbers times |G_c| / |R_c|, and the update sqrt(scale) times that:

        |update_c|^2 = scale rho^2 rank |G_c|^2 / |R_c|^2        R = G P^T, P's entries of variance 1 / rank

    R_c is ``rank`` normal numbers of variance |G_c|^2 / rank, so that rank |R_c|^2 / |G_c|^2 is chi-squared of ``rank``
    degrees of freedom, and the mean of the inverse of that is 1 / (rank - 2). The limiter and the weight see a sum over
    many channels, in which |G_c|^2 / |R_c|^2 counts by its mean, rank / (rank - 2). Hence

        scale = AUTO_CONSTANT * width / rank * (rank - 2) / rank        scale_type="channel"
        scale = AUTO_CONSTANT * width / rank                            scale_type="tensor"

    because the one |R|_F^2 of a tensor is a sum over all channels, which is near its mean. At ranks 1 and 2 the inverse
    of a channel has no mean. They get rank 3's correction, 1/3, and a warning (params/advice.py): some channels take
    updates that are many times AdamW's, whatever the scale.

    Args:
        width: length of the projected dimension of the whole matrix, not of a shard.
        rank: rank of the projection, 1 or more; above the width the law is the same.
        scale_type: "channel" or "tensor".

    Returns a number above 0, which enters the update as its square root. There is none for ``proj="svd"``
    (``Settings.of`` refuses it). P's rows are orthonormal there, and |R_c|^2 is the share of |G_c|^2 that they hold:
    rank / width of noise, for which 1 would be the scale, and nearly all of a gradient of low rank, for which it would
    be width / rank. Measured at width 64 and rank 4 or 16, the update was 0.6 to 5.6 times AdamW's by the law of
    "tensor" without AUTO_CONSTANT.

    >>> auto_scale(1024, 256, "tensor"), auto_scale(1024, 256, "channel")
    (32.0, 31.75)
    """
    correction = 1.0
    if scale_type == "channel":
        counted = max(rank, LEAST_CHANNEL_RANK)
        correction = (counted - 2) / counted
    return AUTO_CONSTANT * width / rank * correction


def scale_of(settings: Settings, whole: Geometry) -> float:
    """The ``scale`` of the matrices of a low-rank weight. ``whole`` is the geometry of the weight, not of its shard.

    >>> import torch, apollo_triton
    >>> weights = [torch.nn.Parameter(torch.ones(shape)) for shape in [(64, 32), (32, 256), (128, 16)]]
    >>> group = {"params": weights, "rank": 4, "scale": "auto", "scale_type": "tensor"}
    >>> settings = Settings.of(apollo_triton.APOLLOAdamW([group]).param_groups[0])
    >>> [scale_of(settings, Geometry.of(weight.shape, "std")) for weight in weights]
    [64.0, 64.0, 32.0]
    """
    if not isinstance(settings.scale, str):
        return settings.scale
    assert settings.rank is not None
    return auto_scale(whole.width, settings.rank, settings.scale_type)
