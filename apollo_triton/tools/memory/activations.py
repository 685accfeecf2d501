"""Activation memory of a training step, measured without a GPU and without allocating it.

Forward and backward of the real model run on the meta device, and a dispatch mode follows the storages that they make
and free. The count therefore holds for any Hugging Face model: it comes from the model's code and autograd, not from a
formula.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...core.implicit_gradient import ImplicitGradient
from ...layerwise.linear import LinearForward
from .storages import Storages

MOST_TOKENS = 1 << 27  # they have memory, unlike activations: 1 GB
FLASH_HEAD = 256  # the widest attention head that the flash kernel takes

aten = torch.ops.aten


@dataclass(frozen=True)
class Peak:
    """Bytes alive at the peak of a step, in addition to weights, buffers and optimizer state.

    ``saved`` was made by the forward pass: the inputs of checkpointed layers, the logits, and what the loss keeps.
    ``working`` was made by the backward pass: a layer's recomputed activations, and gradients of activations.
    ``gradients`` are the weights' gradients. Each storage counts in one part, with its size rounded up to 512 bytes.

    >>> Peak(saved=1024, working=512, gradients=2048).activations
    1536
    """

    saved: int
    working: int
    gradients: int

    @property
    def activations(self) -> int:
        """Bytes of everything except the weights' gradients."""
        return self.saved + self.working

    @property
    def total(self) -> int:
        """Bytes of all three parts together."""
        return self.activations + self.gradients


def training_peak(
    model: nn.Module,
    batch: int,
    sequence: int,
    checkpointing: bool = True,
    layerwise: bool = True,
    without_gradient: Iterable[str] = (),
) -> Peak:
    """The most that forward and backward of one training step allocate on a CUDA device at a time.

    Args:
        model: a Hugging Face language model on the meta device, as ``meta_model`` makes it. It is not changed. Trace it
            before ``quantize_model``: the kernels of int8 weights allocate as much as those of plain layers.
        batch, sequence: the shape of the tokens, which are also the labels.
        checkpointing: keep only the input of each decoder layer, and compute the rest again in backward.
        layerwise: free each weight's gradient once it is complete, as ``attach_layerwise`` does. Otherwise all are
            kept.
        without_gradient: names of the linear layers whose weights have no gradient, as with
            ``attach_layerwise(..., gradients="none")``. Temporary memory of their updates is not counted.

    Attention is counted as CUDA computes it: with the flash kernel for 16-bit floats without a mask, else with the
    memory-efficient kernel. Neither allocates the matrix of scores. Memory that lives within one kernel (cuBLAS'
    workspaces of 8 to 32 MB) or outside the allocator (the CUDA context) is not counted.

    Raises ValueError for a shape below 1, for a model that is not on the meta device or takes no tokens and labels, and
    for a model whose computation depends on values, as a mixture of experts' may.

    >>> from apollo_triton.tools.llama import meta_model  # doctest: +SKIP
    >>> training_peak(meta_model("7B"), batch=1, sequence=256)  # doctest: +SKIP
    Peak(saved=75634176, working=18481664, gradients=262144000)
    """
    check_model(model, batch, sequence)
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise ValueError(f"{name} is a {type(parameter).__name__}: trace the model before quantize_model")
    model = copy.deepcopy(model).train()  # cheap: its tensors have no memory
    set_checkpointing(model, checkpointing, AsOnCuda)
    updater = _NoUpdates()  # kept here, because the layers do not keep it alive
    for name in without_gradient:
        layer: Any = model.get_submodule(name)
        layer.forward = LinearForward(layer, updater)
    try:
        with Allocations(model, layerwise) as allocations:
            tokens = torch.zeros(batch, sequence, dtype=torch.long)
            with AsOnCuda():
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            allocations.end_forward()
            loss.backward()
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"a {type(model).__name__} cannot be traced without its values: {reason}") from error
    return allocations.peak()


class _NoUpdates:
    """An updater of linear layers that accepts every weight and changes none."""

    def takes(self, weight: Tensor) -> bool:
        return True

    def pays(self, weight: Tensor, tokens: int) -> bool:
        return True

    def check(self, weight: Tensor, ran_once: bool) -> None:
        pass

    def update(self, weight: Tensor, gradient: ImplicitGradient) -> None:
        pass

    def name(self, weight: Tensor) -> str:
        return "a weight"


def set_checkpointing(model: Any, on: bool, context: Callable[[], Any]) -> None:
    """Whether the decoder layers keep only their inputs. ``context()`` is that of what is computed again."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5.2x
    if not on:
        getattr(model, f"{kind}_checkpointing_disable")()
        return
    # The determinism check compares devices. AsOnCuda hides them from the model, but not from autograd.
    options = {"use_reentrant": False, "determinism_check": "none", "context_fn": lambda: (nullcontext(), context())}
    getattr(model, f"{kind}_checkpointing_enable")(options)


def check_model(model: nn.Module, batch: int, sequence: int) -> None:
    """Raise ValueError unless ``model`` is without memory and can be trained with tokens of this shape."""
    for name, value in (("batch", batch), ("sequence", sequence)):
        if value < 1:
            raise ValueError(f"{name}={value} (allowed: 1 or more)")
    if batch * sequence > MOST_TOKENS:
        raise ValueError(f"batch={batch} and sequence={sequence} (allowed: up to {MOST_TOKENS:,} tokens)")
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            raise ValueError(f"{name} is on {parameter.device}: give a model on the meta device, as meta_model makes")
    takes = inspect.signature(model.forward).parameters.keys()
    if not (hasattr(model, "gradient_checkpointing_enable") and takes >= {"input_ids", "labels"}):
        raise ValueError(f"a {type(model).__name__} takes no input_ids and labels: give a language model with its head")


class Allocations(Storages):
    """Follows every storage that is made while the mode is on, except the weights and buffers of ``model``.

    A storage is known to be a weight's gradient only later, when it reaches ``.grad``.

    >>> layer = nn.Linear(256, 256, bias=False)
    >>> with Allocations(layer, layerwise=False) as allocations:
    ...     loss = layer(torch.ones(1, 256)).sum()
    ...     allocations.end_forward()
    ...     loss.backward()
    >>> allocations.peak().gradients == 4 * 256 * 256
    True
    """

    def __init__(self, model: nn.Module, layerwise: bool) -> None:
        super().__init__("saved")
        self._model, self._layerwise = model, layerwise
        self._hooks: list[Any] = []
        self.ignore((*model.parameters(), *model.buffers()))

    def __enter__(self) -> Allocations:
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._gradient_is_complete))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def end_forward(self) -> None:
        """Call this between forward and backward: storages made from here on count as the backward's."""
        self.part = "working"

    def peak(self) -> Peak:
        """The largest total so far, by parts."""
        return Peak(**(dict.fromkeys(("saved", "working", "gradients"), 0) | self.parts_at_peak()))

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return _call(func, args, kwargs)

    def _gradient_is_complete(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        self.mark([parameter.grad], "gradients")
        if self._layerwise:
            parameter.grad = None


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on the meta device if any of its tensors is there, else unchanged.

    Integers that depend on no weight, such as positions and the masks made of them, so keep their values. Models read
    them to decide whether a mask is needed.
    """
    if not any(isinstance(value, Tensor) and value.is_meta for value in tree_leaves((args, kwargs))):
        return func(*args, **kwargs)
    if "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("meta")}
        if func is aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            return aten.alias.default(*args)  # a move from the device to itself
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
    return func(*args, **kwargs)


class AsOnCuda(TorchFunctionMode):
    """Uses CUDA's attention kernels, and hides the meta device from the model.

    Autocast does not know the meta device, and positions and masks would lose their values on it. The model sees all
    tensors on one device, and ``_call`` moves those of an operation to the meta device if necessary.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:
            return torch.device("cpu")
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that ``scaled_dot_product_attention`` uses on a CUDA device."""
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= FLASH_HEAD:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
