"""The paper's LLaMA and its optimizer: on one device, under DDP, or sharded by FSDP2."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from apollo_triton import APOLLOAdamW, attach_layerwise, quantize_model
from apollo_triton.core.dtensors import local
from apollo_triton.int8.weight import int8_weight_of
from apollo_triton.tools.llama import meta_model, paper_figures


def llama_config(options: argparse.Namespace) -> LlamaConfig:
    """The paper's config of this size. For a trial, ``--layers`` makes it shallower and ``--shrink`` narrower."""
    shape = paper_figures()["llama"][options.model]
    heads = max(1, shape["heads"] // options.shrink)
    return LlamaConfig(
        hidden_size=shape["hidden"] // options.shrink,
        intermediate_size=shape["intermediate"] // options.shrink,
        num_hidden_layers=options.layers or shape["layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=options.vocabulary,
        max_position_embeddings=max(2048, options.sequence),
        tie_word_embeddings=False,
        use_cache=False,
        architectures=["LlamaForCausalLM"],
    )


class Trained:
    """A model and its optimizer, on one device or on several, with steps of one or more backward passes."""

    def __init__(self, options: argparse.Namespace, config: Path, device: torch.device) -> None:
        dtype = getattr(torch, options.dtype)
        # First without memory: the int8 model never exists in float, and the sharded model never exists whole.
        self.bare = meta_model(str(config), dtype)
        if options.method.startswith("q-"):
            quantize_model(self.bare)
        if options.parallel == "fsdp":
            _shard(self.bare, device)
        fill(self.bare.to_empty(device=device), options.seed)
        if options.checkpoint_activations:
            self.bare.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.bare.train()
        self.optimizer = make_optimizer(self.bare, options)
        self.layerwise = None
        if options.gradients != "kept":
            self.layerwise = attach_layerwise(self.bare, self.optimizer, gradients=options.gradients)
        self.model: nn.Module = self.bare
        if options.parallel == "ddp":
            self.model = DistributedDataParallel(self.bare)

    def backward(self, batches: list[Tensor]) -> Tensor:
        """Compute the gradient of the mean loss over some batches of one size, averaged over the ranks.

        Returns this rank's mean loss.
        """
        total = torch.zeros((), device=batches[0].device)
        for count, tokens in enumerate(batches, 1):
            with ExitStack() as stack:
                if count < len(batches):
                    self._accumulate_only(stack)
                elif isinstance(self.bare, torch.distributed.fsdp.FSDPModule):
                    self.bare.set_requires_gradient_sync(True)
                loss = self.model(input_ids=tokens, labels=tokens).loss / len(batches)
                loss.backward()
            total += loss.detach()
        return total

    def _accumulate_only(self, stack: ExitStack) -> None:
        """For all batches except the last one: gradients add up, and are neither sent to other ranks nor used."""
        if isinstance(self.model, DistributedDataParallel):
            stack.enter_context(self.model.no_sync())
        elif isinstance(self.bare, torch.distributed.fsdp.FSDPModule):
            self.bare.set_requires_gradient_sync(False)
        elif self.layerwise is not None:
            stack.enter_context(self.layerwise.accumulate())

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value


def make_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """The paper's settings. Apart from learning rate and scale they are the defaults of ``apollo`` and ``mini``."""
    if options.method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    settings: dict[str, Any] = {
        "lr": options.lr,
        "weight_decay": 0.0,
        "update_proj_gap": options.update_proj_gap,
        "seed": options.seed,
        "stochastic_rounding": options.stochastic_rounding,
        "state_bits": options.state_bits,
    }
    if options.method.endswith("mini"):
        return APOLLOAdamW.mini(model, scale=128.0, **settings)
    return APOLLOAdamW.apollo(model, rank=max(1, options.rank // options.shrink), scale=1.0, **settings)


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Fill the model with random weights, one tensor at a time, and make its rotary embedding, which had no memory.

    The weights do not depend on how the model is sharded.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        whole = torch.randn(parameter.shape, generator=generator, device=device) * model.config.initializer_range
        if isinstance(parameter, DTensor):
            # No communication is needed: all ranks have drawn the same tensor.
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        int8 = int8_weight_of(parameter)
        if int8 is not None:
            int8.assign(whole)
        else:
            local(parameter).copy_(whole)
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(device)


def _shard(model: nn.Module, device: torch.device) -> None:
    # Weights keep their dtype, float32 or bfloat16. Sums over the ranks are always in float32.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    # Embedding and head too: in the model's own unit they would stay whole from the forward pass to the backward pass.
    for part in (model.model.embed_tokens, *model.model.layers, model.lm_head, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
