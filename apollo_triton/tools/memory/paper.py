"""The memory column of the paper's tables beside exact counts under the paper's convention.

The convention, as far as there is one (docs/memory.md): everything is in bfloat16. All weights count, and AdamW's two
moments. For the low-rank methods the moments of the projected matrices count, and a stored projection. The moments of
embeddings, head and norms do not count for them, although these are trained with AdamW. A G is 10**9 bytes in some
cells and 2**30 in others, so both are tried. A cell that agrees with neither gets a note of what its figure would take.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ...core.settings import Settings
from ...optimizer import APOLLOAdamW
from ...params.member import geometry_of
from ...params.state import state_shapes
from ..llama import meta_model, paper_figures

GB, GIB = 10**9, 2**30
BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class Cell:
    """One printed figure, and the bytes it stands for.

    ``printed`` has the paper's digits. ``counted`` is our count in bytes under the paper's convention. ``note`` says
    what the printed figure would take; it is shown if the count agrees in neither unit.

    >>> Cell("APOLLO-Mini", "350M", "0.69", 736_448_512).reproduced
    'GiB'
    """

    method: str
    size: str
    printed: str
    counted: int
    note: str = ""

    def digits(self, unit: int) -> str:
        """The count in ``unit`` bytes, to as many digits as the paper prints."""
        return f"{self.counted / unit:.{len(self.printed.partition('.')[2])}f}"

    @property
    def reproduced(self) -> str:
        """The unit in which the count has the printed digits: "GB", "GiB", both as "GB, GiB", or ""."""
        return ", ".join(name for name, unit in (("GB", GB), ("GiB", GIB)) if self.digits(unit) == self.printed)


def pretraining_cells() -> list[Cell]:
    """Weights and states of the C4 pre-training table, 60M to 1B. GaLore and Fira keep the same tensors as APOLLO svd,
    and the paper prints the same figure for all three, so they share one cell."""
    printed = paper_figures()["pretrain_c4_perplexity"]
    cells = []
    for size in printed["AdamW"]:
        model = meta_model(size)
        weights = BFLOAT16_BYTES * sum(parameter.numel() for parameter in model.parameters())
        quarter = paper_figures()["rank"][size]
        paper_weights = printed["APOLLO-Mini"][size][1]
        for method, (low_rank, dense) in {
            "AdamW": (2 * weights, 0),
            "APOLLO svd": _low_rank_and_dense(APOLLOAdamW.apollo(model, rank=quarter, proj="svd")),
            "APOLLO r=1/4": _low_rank_and_dense(APOLLOAdamW.apollo(model, rank=quarter)),
            "APOLLO r=1/8": _low_rank_and_dense(APOLLOAdamW.apollo(model, rank=quarter // 2)),
            "APOLLO-Mini": _low_rank_and_dense(APOLLOAdamW.mini(model)),
        }.items():
            figure = printed[method][size][1]
            if method in ("AdamW", "APOLLO-Mini"):
                note = _weights_needed(figure, 3 * BFLOAT16_BYTES if method == "AdamW" else BFLOAT16_BYTES)
            else:
                note = _states_needed(figure, paper_weights, weights, low_rank, dense)
            cells.append(Cell(method, size, f"{figure:.2f}", weights + low_rank, note))
    methods = [cell.method for cell in cells]
    return sorted(cells, key=lambda cell: methods.index(cell.method))


def state_cells() -> list[Cell]:
    """The states, without weights, that the 7B table prints. For 8-bit Adam it counts one byte per moment."""
    printed = paper_figures()["state_gb_7b"]
    model = meta_model("7B")
    counted = {
        "8-bit Adam": 2 * sum(parameter.numel() for parameter in model.parameters()),
        "APOLLO r=256": _low_rank_and_dense(APOLLOAdamW.apollo(model, rank=256))[0],
        "APOLLO-Mini": _low_rank_and_dense(APOLLOAdamW.mini(model))[0],
    }
    return [Cell(method, "7B", printed[method], count) for method, count in counted.items()]


def _low_rank_and_dense(optimizer: APOLLOAdamW) -> tuple[int, int]:
    """Bytes in bfloat16 of the projected matrices' states, and of the dense parameters' moments."""
    low_rank = dense = 0
    for group in optimizer.param_groups:
        settings = Settings.of(group)
        for parameter in group["params"]:
            size = BFLOAT16_BYTES * sum(prod(shape) for shape in state_shapes(parameter, settings).values())
            if geometry_of(parameter, settings) is None:
                dense += size
            else:
                low_rank += size
    return low_rank, dense


def _weights_needed(figure: float, bytes_each: int) -> str:
    """How many weights a printed figure stands for, in either unit."""
    return f"{figure * GB / bytes_each / 1e6:.1f}M weights (GB), {figure * GIB / bytes_each / 1e6:.1f}M (GiB)"


def _states_needed(figure: float, paper_weights: float, weights: int, low_rank: int, dense: int) -> str:
    """What a printed figure leaves for the states, beside the exact ones without and with the dense moments."""
    for name, unit in (("GB", GB), ("GiB", GIB)):
        rounded = round(weights / unit, 2), round((low_rank + dense) / unit, 2)
        if round(sum(rounded), 2) == figure:
            return f"{rounded[0]:.2f} + {rounded[1]:.2f} {name}, dense moments counted"
    return f"{figure - paper_weights:.2f} of states; exact {low_rank / GB:.2f} or {(low_rank + dense) / GB:.2f}"
