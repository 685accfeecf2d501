"""The storages that are alive in a step of sharded training on one rank, and what the step sends: on real tensors over
gloo or nccl, or on fake ones in a process group that sends nothing.

Each part is known by the operation that makes or uses it: FSDP2's own operators gather and reduce.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.utils._pytree import tree_leaves

from ...engine.agreement import Agreement
from ...engine.engine import Engine
from .storages import Moments, Storages, by_part
from .twins import Twins

# The parts, in the order in which they are shown.
WEIGHTS = "weight shards"
STATE = "optimizer state"
UNSHARDED = "unsharded weights"
GATHERED = "gathered, not yet copied out"
GRADIENTS = "gradients before their reduction"
REDUCING = "reduce buffers"
SHARDED_GRADIENTS = "gradient shards"
UPDATE = "working memory of an update"
SAVED = "activations kept by the forward"
WORKING = "activations of the backward"
BUFFERS = "buffers and tokens"
PARTS = (
    WEIGHTS,
    STATE,
    UNSHARDED,
    GATHERED,
    GRADIENTS,
    REDUCING,
    SHARDED_GRADIENTS,
    UPDATE,
    SAVED,
    WORKING,
    BUFFERS,
)
_HOST = "on the host"

_c10d, _fsdp = torch.ops.c10d, torch.ops.fsdp
_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


class Result(NamedTuple):
    """The bytes of each part at the peak, and what a step sends: by the "model" and by the "update"."""

    parts: dict[str, int]
    exchanges: dict[str, int]
    received: dict[str, int]


class LiveStep(Storages):
    """Follows the storages of one rank's training: of ``model``, which is sharded, and ``optimizer``.

    ``kernels``: count the updates as the Triton kernels do them, not as PyTorch's operations. The tensors must be fake.
    ``exchanges`` and ``received`` are the collectives and the bytes that they bring since ``begin``, of the "update"
    and of the "model", which is FSDP2 or tensor parallelism.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        kernels: bool = False,
    ) -> None:
        super().__init__(SAVED, rounding=1)
        self._model, self._optimizer, self._kernels = model, optimizer, kernels
        self._updating = False
        self._phases: dict[str, Moments] = {}
        self.exchanges: Counter[str] = Counter()
        self.received: Counter[str] = Counter()

    def __enter__(self) -> LiveStep:
        super().__enter__()
        self._twins = None if active_fake_mode() is None else Twins(self, self._kernels)
        run = self._run = Engine.run
        self._check = Agreement.check
        this = self

        def followed(engine: Engine, groups: Any, states: Any, *arguments: Any, **options: Any) -> None:
            this._followed(run, engine, groups, states, arguments, options)

        Engine.run = followed  # type: ignore[method-assign,assignment]
        if self._twins is not None:
            Agreement.check = _nobody_to_ask  # type: ignore[method-assign]
        self.mark(self._model.parameters(), WEIGHTS)
        self.mark(self._model.buffers(), BUFFERS)
        return self

    def __exit__(self, *exception: Any) -> None:
        Engine.run, Agreement.check = self._run, self._check  # type: ignore[method-assign]
        super().__exit__(*exception)

    def counts(self, storage: torch.UntypedStorage) -> bool:
        """Fake tensors and those of the meta device. With kernels all others are tables on the host."""
        return not self._kernels or storage.device.type == "meta"

    def begin(self) -> None:
        """From here on counts, with what is alive now."""
        self.forget_peak()
        self.exchanges.clear()
        self.received.clear()

    @property
    def phases(self) -> dict[str, list[dict[str, int]]]:
        """Of forward, backward and update: the bytes of each part whenever something was about to be freed."""
        self.keep_moments()  # the last moment of the last phase
        return {phase: [_shown(by_part(moment)) for moment in moments] for phase, moments in self._phases.items()}

    def result(self) -> Result:
        """What there was since ``begin``."""
        return Result(_shown(self.parts_at_peak()), dict(self.exchanges), dict(self.received))

    def step(self, tokens: Tensor, forward: Any, moments: bool = False) -> None:
        """One step of training. ``forward(tokens)`` returns the loss. ``moments``: keep what ``phases`` tells."""
        with self.making(SAVED):
            self._begin("forward", moments)
            self.mark([tokens], BUFFERS)
            loss = forward(tokens)
        with self.making(WORKING):
            self._begin("backward", moments)
            loss.backward()
            del loss
            self._begin("update", moments)
            self._optimizer.step()
            self._optimizer.zero_grad()
        for state in self._optimizer.state.values():
            self._mark_state(state)

    def _begin(self, phase: str, moments: bool) -> None:
        if moments:
            self._phases[phase] = self.keep_moments()

    def _followed(self, run: Any, engine: Engine, groups: Any, states: Any, arguments: Any, options: Any) -> None:
        """``Engine.run``, whose memory is an update's, and what it leaves in the state the state's."""
        gradients = [parameter.grad for group in groups for parameter in group["params"] if parameter.grad is not None]
        self.mark(gradients, SHARDED_GRADIENTS)
        self._updating = True
        try:
            with self.making(UPDATE):
                if self._twins is None:
                    run(engine, groups, states, *arguments, **options)
                    changed = [states[parameter] for group in groups for parameter in group["params"]]
                else:
                    changed = self._twins.run(run, engine, groups, *arguments, **options)
        finally:
            self._updating = False
        for state in changed:
            self._mark_state(state)

    def _mark_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if isinstance(value, Tensor):
                self.mark([value], _HOST if name == "step" else STATE)

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is torch.ops._c10d_functional.wait_tensor.default and active_fake_mode() is not None:
            return args[0]  # what it is for real; a fake one would be a copy
        return func(*args, **kwargs)

    def seen(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        namespace = func.namespace
        if namespace == "fsdp":
            self._seen_fsdp(func, args, kwargs)
        elif namespace in _COLLECTIVES and not any(word in func.__name__ for word in ("wait", "wrap")):
            self._seen_collective(func, args, result)

    def _seen_fsdp(self, func: Any, args: Any, kwargs: Any) -> None:
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        if func is _fsdp.all_gather_copy_in.default:
            self.mark([given["all_gather_output"]], GATHERED)
        elif func is _fsdp.split_with_sizes_copy.default:
            self.mark(given["out"], UNSHARDED)
        elif func is _fsdp.chunk_cat.default:
            self.mark(given["tensors"], GRADIENTS)
            self.mark([given["out"]], REDUCING)

    def _seen_collective(self, func: Any, args: Any, result: Any) -> None:
        if func is _c10d._reduce_scatter_base_.default:
            self.mark([args[0]], SHARDED_GRADIENTS)
        who = "update" if self._updating else "model"
        self.exchanges[who] += 1
        self.received[who] += received_by(func, args, result)


def _nobody_to_ask(*arguments: Any, **options: Any) -> None:
    """``Agreement.check`` of the only rank that there is, whose parameters have no values."""


def _shown(sizes: dict[str, int]) -> dict[str, int]:
    """In the order of ``PARTS``, without what is on the host."""
    return {part: sizes[part] for part in PARTS if part in sizes}


def received_by(func: Any, args: Any, result: Any) -> int:
    """The bytes that a collective brings to a rank, as a ring sends them: all parts that are not its own, and in an
    all-reduce each twice, once to be added and once as a sum."""
    name = func.__name__
    in_place = func.namespace == "c10d"
    tensors = [each for each in tree_leaves(args[0] if in_place else result) if isinstance(each, Tensor)]
    size, ranks = sum(tensor.nbytes for tensor in tensors), _ranks(args)
    if "reduce_scatter" in name:
        return size * (ranks - 1)  # the result is one part of as many
    return size * (ranks - 1) // ranks * (2 if "allreduce" in name or "all_reduce" in name else 1)


def _ranks(arguments: Any) -> int:
    """The size of the process group among the arguments of a collective."""
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            with suppress(RuntimeError):  # for example a reduction operation
                return torch.distributed.ProcessGroup.unbox(argument).size()
    name: Any = next(argument for argument in reversed(arguments) if isinstance(argument, str))
    return torch.distributed.distributed_c10d._resolve_process_group(name).size()
