"""What a card holds and a step sends, when a model trains on many: predicted without memory.

There is no formula. One process plays the first rank of a process group that sends nothing. It shards the real model,
makes the real optimizer and trains two steps, all on fake tensors, and every storage that is alive is followed.
``train`` does the same with real tensors in a real process group: the tests compare both, byte by byte.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ...backends.reference.dense_8bit import bitsandbytes_update
from ...core.embeddings import Embeddings
from ...core.moments_8bit import dynamic_code
from ...layerwise.handle import attach_layerwise
from ...optimizer import APOLLOAdamW
from .activations import AsOnCuda, check_model, set_checkpointing
from .alike import FEW, extended, like_layers
from .fake_world import fake_mesh
from .live_step import LiveStep, Result
from .sharding import check_cards, fake_of, shard


@dataclass(frozen=True)
class Setup:
    """How a model is trained on ``gpus`` cards.

    ``shard`` is "fsdp2", "hsdp" (two replicas) or "tp". ``rank`` is APOLLO's, None for APOLLO-Mini. ``adamw``:
    PyTorch's AdamW instead, with moments in the weights' dtype. Int8 weights are those of the model that is given.
    ``embeddings`` is that of ``APOLLOAdamW``.

    >>> Setup(8, "hsdp").mesh
    {'replicas': 2, 'shards': 4}
    """

    gpus: int
    shard: str = "fsdp2"
    layerwise: bool = False
    state_bits: int = 32
    checkpointing: bool = False
    rank: int | None = None
    adamw: bool = False
    embeddings: Embeddings = None

    @property
    def mesh(self) -> dict[str, int]:
        """The dimensions of the device mesh."""
        return {"replicas": 2, "shards": self.gpus // 2} if self.shard == "hsdp" else {"shards": self.gpus}


def predicted(model: Any, setup: Setup, batch: int, sequence: int, on_cuda: bool = True) -> Result:
    """What the first rank holds in a step, which is most, and what the step sends.

    Args:
        model: a Hugging Face language model on the meta device, which ``quantize_model`` may have made int8. It is not
            changed.
        setup: how it is sharded and trained.
        batch, sequence: the shape of a card's tokens. Under tensor parallelism all cards have the same.
        on_cuda: count attention and updates as a CUDA device does them; otherwise as a CPU does.

    A model of many layers that are alike is followed with few (alike.py), to the same bytes.

    Raises ValueError for what cannot be sharded or trained so, and for a model whose computation depends on values.
    """
    check_model(model, batch, sequence)
    check_cards(model, setup.gpus, setup.shard)
    layers = like_layers(model)
    try:
        if layers is not None and len(layers) > sum(FEW):  # else it is no shorter
            few = [followed(_with_layers(model, count), setup, batch, sequence, on_cuda, True) for count in FEW]
            found = extended(few, len(layers))
            if found is not None:
                return found
        return followed(copy.deepcopy(model), setup, batch, sequence, on_cuda).result()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"a {type(model).__name__} cannot be followed without its values: {reason}") from error


def _with_layers(model: Any, count: int) -> Any:
    """The model with its first ``count`` layers. Copies are cheap: tensors of the meta device have no memory."""
    copied = copy.deepcopy(model)
    layers = like_layers(copied)
    assert layers is not None
    del layers[count:]
    return copied


def followed(model: Any, setup: Setup, batch: int, sequence: int, on_cuda: bool, moments: bool = False) -> LiveStep:
    """``train`` on fake tensors in place of those of ``model``."""
    for signed in (True, False):  # 2 kB that a process makes once are counted in no run, not in the first one alone
        dynamic_code(signed, torch.device("meta"))
    if setup.state_bits == 8:
        bitsandbytes_update()  # imported here: a log of what fails in it would keep a step's frames, and its gradients
    with fake_mesh(**setup.mesh) as mesh, FakeTensorMode():
        tokens = torch.zeros(batch, sequence, dtype=torch.long)
        return train(fake_of(model), setup, mesh, tokens, on_cuda, moments)


def train(
    model: Any, setup: Setup, mesh: Any, tokens: Tensor, on_cuda: bool = False, moments: bool = False
) -> LiveStep:
    """Shard ``model``, train two steps, and return what was alive in the second one, for which the first has made
    whatever lasts. ``on_cuda`` needs fake tensors."""
    shard(model, setup.shard, mesh)
    optimizer: torch.optim.Optimizer
    if setup.adamw:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # the other kinds need temporaries
    else:
        options: dict[str, Any] = {"state_bits": setup.state_bits, "embeddings": setup.embeddings}
        if setup.rank is None:
            optimizer = APOLLOAdamW.mini(model, **options)
        else:
            optimizer = APOLLOAdamW.apollo(model, setup.rank, **options)
    if setup.layerwise:
        assert isinstance(optimizer, APOLLOAdamW)
        attach_layerwise(model, optimizer)
    context = AsOnCuda if on_cuda else nullcontext
    set_checkpointing(model.train(), setup.checkpointing, context)

    def forward(tokens: Tensor) -> Tensor:
        with context():
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    with LiveStep(model, optimizer, on_cuda) as live:
        live.step(tokens, forward)
        live.begin()
        live.step(tokens, forward, moments)
    return live
