"""APOLLOAdamW: parameter groups, state and ``step``; the only file that knows ``torch.optim``.

``engine/engine.py`` runs the step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .backends.selection import backend_of, may_leave_scaling
from .core.device_backend import Backend
from .core.embeddings import Embeddings
from .core.messages import shown
from .core.param_groups import DenseKeys, groups_of_model
from .core.settings import FIELD_NAMES, LOW_RANK_DEFAULTS, Settings, complete_group
from .core.spelling import SPLIT_KEYS, explaining_unknown_options, options_of, unknown_option
from .core.targets import DEFAULT_TARGETS, Targets
from .engine.caches import Caches
from .engine.engine import Engine, Scaling
from .engine.step_hooks import StepHooks
from .params.advice import (
    advise_on_group,
    advise_on_keys,
    advise_on_plain_adamw,
    advise_on_rounding,
    advise_on_state_bits,
    check_is_no_model,
    loses_updates,
)
from .params.checks import check_groups, holds_matrix
from .params.idle import IdleSteps
from .params.loading import FOREIGN_KEY, Loaded, read_state_dict, with_indices
from .params.member import params_of
from .params.new_group import NewGroup, place_learning_rate
from .params.split import Split
from .summary import Summary, summary_of


class APOLLOAdamW(Optimizer):
    """APOLLO and APOLLO-Mini (arXiv 2412.05270), which replace AdamW where AdamW's memory does not fit.

    In a group with a ``rank`` the gradient of each weight matrix is projected to ``[channels, rank]``, Adam's moments
    live there, and their ratio to the projected gradient rescales the gradient per channel (``scale_type="channel"``,
    APOLLO) or per tensor (``"tensor"`` with rank 1, APOLLO-Mini). A group without ``rank``, and any weight with fewer
    than two dimensions, is dense AdamW. Its key ``second_moment``, "element" or "row", says whether a matrix has one
    second moment an element or, as in Adam-mini (arXiv 2406.16793), one a row.

    Args:
        params: named parameters, parameters or groups; ``apollo_param_groups(model)`` makes the groups. All that
            follows except ``max_grad_norm``, ``target_modules`` and what concerns dense groups may be a key of a group.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of the first and second moment.
        eps: added to the square root of the second moment; above 0.
        weight_decay: W <- W - lr * weight_decay * W, after the update.
        correct_bias: whether to apply Adam's bias correction.
        scale_front: multiply by sqrt(scale) before the norm-growth limiter instead of after it; to rounding the same.
        disable_nl: turn the norm-growth limiter off.
        no_deprecation_warning: accepted for apollo-torch's sake; there is no such warning here.
        seed: the projections' seed, 0 to 2**32 - 1; matrices of one width share a projection. A parameter keeps the
            seed of its first step.
        seed_per_param: give each parameter a projection of its own, drawn from ``seed``.
        backend: "auto" takes the Triton kernels for parameters on CUDA, ROCm and XPU devices and PyTorch for all
            others; "triton" and "reference" insist on one. See ``backend_for``.
        state_dtype: torch.float32, or torch.bfloat16, which is stored with stochastic rounding; groups hold its name.
        state_bits: 8 for moments in bitsandbytes' blockwise 8-bit format, a byte each and a float32 for every 256;
            else 32. bitsandbytes itself updates those of dense matrices. Ranks below 16, norms and biases, and shards
            that are no whole blocks stay in ``state_dtype``.
        min_8bit_size: moments of fewer elements stay in ``state_dtype``.
        stochastic_rounding: round bfloat16 weights stochastically at the store.
        max_grad_norm: clip all gradients together, dense ones included, to this 2-norm; gradients are not written.
        capturable: keep learning rate and step count on the device, so that a step can be captured in a CUDA graph and
            replayed under a learning-rate scheduler. Needs the kernels.
        rank: split each group that has no key "rank" into low-rank and dense ones, as ``apollo_param_groups`` does, by
            the names and shapes of its parameters; a group's own keys win, and ``"rank": None`` keeps it dense. Without
            names every matrix that can be is low-rank. ``add_param_group`` splits too.
        target_modules: which modules are low-rank, by name, as in ``apollo_param_groups``.
        scale_type, scale, proj, proj_type, update_proj_gap, distribution, rank_above_width: of low-rank groups.
            ``scale`` enters as its square root. It is "auto", with which AdamW's ``lr`` fits, where ``rank`` is given
            here, and 1 in groups with a rank of their own. ``rank_above_width`` takes a rank that inflates the state.
        dense_lr, embedding_lr: learning rates of what ``rank`` leaves dense, and of embeddings. By default ``lr``.
        decay_vectors: whether the norms and biases that ``rank`` leaves dense decay.
        embeddings: how the state of embeddings and head is kept: None, a name, or keys of a dense group, as in
            ``apollo_param_groups``. It needs ``rank`` and names.

    State of a low-rank parameter: ``step``, ``seed``, ``exp_avg`` and ``exp_avg_sq`` ``[channels, rank]``,
    ``update_norm`` (float32, 0 before the first step), ``projection`` for svd alone; 8-bit moments are ``exp_avg_q``,
    ``exp_avg_absmax`` and the like; a tensor of several experts ``[experts, rows, columns]`` has them as leading
    dimension in each. A dense parameter has moments of its own shape, or with ``second_moment="row"`` an ``exp_avg_sq``
    ``[rows, 1, ...]``, always float32. Weights are float32, bfloat16 or float16; all arithmetic is float32. A gradient
    that is not finite moves nothing and is counted in ``skipped_updates``.

    Raises:
        ValueError: a hyperparameter that is not allowed or has no effect, a rank above a width, which a group may
            allow, or a ``rank`` with which nothing is low-rank.
        RuntimeError: a sparse or complex gradient. Weights and state are then as they were.

    >>> layer = torch.nn.Linear(64, 256)
    >>> optimizer = APOLLOAdamW(layer.named_parameters(), rank=16, lr=1e-3)
    >>> layer(torch.ones(64)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[layer.weight]["exp_avg"].shape
    torch.Size([256, 16])
    """

    _layerwise: StepHooks | None = None  # neither copied nor pickled, as hooks are not
    _told_of_rounding = False
    _split = Split()  # of an optimizer that an older version pickled

    @explaining_unknown_options
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        scale_front: bool = False,
        disable_nl: bool = False,
        no_deprecation_warning: bool = True,
        *,
        seed: int = 0,
        seed_per_param: bool = False,
        backend: str = "auto",
        state_dtype: torch.dtype | str = torch.float32,
        state_bits: int = 32,
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        capturable: bool = False,
        rank: int | None = None,
        target_modules: str | Iterable[str] = DEFAULT_TARGETS,
        scale_type: str = "channel",
        scale: float | str | None = None,
        proj: str = "random",
        proj_type: str = "std",
        update_proj_gap: int = 200,
        distribution: str = "gaussian",
        rank_above_width: bool = False,
        dense_lr: float | Tensor | None = None,
        embedding_lr: float | Tensor | None = None,
        decay_vectors: bool = False,
        embeddings: Embeddings = None,
    ) -> None:
        check_is_no_model(params, type(self).__name__)
        defaults = {
            "lr": lr.detach().clone() if isinstance(lr, Tensor) else lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
            "scale_front": scale_front,
            "disable_nl": disable_nl,
            "seed": seed,
            "seed_per_param": seed_per_param,
            "backend": backend,
            "state_dtype": state_dtype,
            "state_bits": state_bits,
            "min_8bit_size": min_8bit_size,
            "stochastic_rounding": stochastic_rounding,
            "max_grad_norm": max_grad_norm,
            "capturable": capturable,
        }
        Settings.of(defaults)
        self._split = Split.of(
            rank,
            target_modules,
            DenseKeys(dense_lr, embedding_lr, decay_vectors, embeddings),
            scale_type=scale_type,
            scale=scale,
            proj=proj,
            proj_type=proj_type,
            update_proj_gap=update_proj_gap,
            distribution=distribution,
            rank_above_width=rank_above_width,
        )
        if not isinstance(params, Tensor):
            params = self._split.checked(params)
        self._reset_transients()
        self._had_matrix: list[bool] = []
        self._reasons: dict[Tensor, str] = {}
        super().__init__(params, defaults)
        if not isinstance(params[0], dict):
            advise_on_plain_adamw(self.param_groups[0]["params"])
        advise_on_state_bits(self.param_groups)

    @classmethod
    def apollo(cls, model: torch.nn.Module, rank: int = 256, **options: Any) -> APOLLOAdamW:
        """APOLLO for a whole model: the matrices of its blocks at ``rank``, a factor for each channel, the rest dense.

        ``options`` are the constructor's, and win over APOLLO's own. ``lr`` is what AdamW takes: ``scale`` is "auto".
        With the paper's ``scale=1`` it is about ten times that. Norms and biases do not decay unless asked.

        >>> optimizer = APOLLOAdamW.apollo(model, rank=256, lr=1e-3)  # doctest: +SKIP
        """
        return cls._for_model(model, {"rank": rank, "scale_type": "channel"} | options)

    @classmethod
    def mini(cls, model: torch.nn.Module, **options: Any) -> APOLLOAdamW:
        """APOLLO-Mini for a whole model: rank 1, one factor a tensor, the rest dense.

        ``options`` are the constructor's, and win over Mini's own. ``lr`` is what AdamW takes: ``scale`` is "auto".
        The paper's setting is ``scale=128`` with an ``lr`` of 1e-2. Norms and biases do not decay unless asked.

        >>> optimizer = APOLLOAdamW.mini(model, lr=1e-3)  # doctest: +SKIP
        """
        return cls._for_model(model, {"rank": 1, "scale_type": "tensor"} | options)

    @classmethod
    def _for_model(cls, model: torch.nn.Module, options: dict[str, Any]) -> APOLLOAdamW:
        known = options_of(cls, APOLLOAdamW)
        for name in options:
            if name not in known:
                raise TypeError(f"{cls.__name__}: {unknown_option(name, known)}")
        of_split = {name: options.pop(name) for name in SPLIT_KEYS if name in options}
        group_keys = {name: options.pop(name) for name in ("rank", *LOW_RANK_DEFAULTS) if name in options}
        target_modules = Targets(None, of_split.pop("target_modules", DEFAULT_TARGETS)).given  # it may be a generator
        rank = group_keys.pop("rank")
        dense = DenseKeys(**of_split)
        groups, reasons = groups_of_model(model, rank, target_modules, dense, group_keys)
        optimizer = cls(groups, **options)
        optimizer._reasons |= reasons
        defaults = LOW_RANK_DEFAULTS | {"scale": None} | group_keys
        optimizer._split = Split.of(rank, target_modules, dense, **defaults)  # of groups that are added later
        return optimizer

    def _reset_transients(self) -> None:
        """What is neither state nor hyperparameter, and is therefore not saved, copied or pickled."""
        self._caches = Caches()
        self._engine = Engine(self._caches)
        self._idle_steps = IdleSteps()
        if self._layerwise is not None:
            self._layerwise.forget()  # its engines have the old caches

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_split": self._split, "_reasons": self._reasons}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset_transients()
        self.defaults.pop(FOREIGN_KEY, None)
        self.defaults = _DEFAULTS | self.defaults  # an older version's lacks what has come since
        for group in self.param_groups:
            group.pop(FOREIGN_KEY, None)
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            complete_group(group)
            place_learning_rate(group)
        self.__dict__.setdefault("_had_matrix", [holds_matrix(group) for group in self.param_groups])
        self.__dict__.setdefault("_reasons", {})

    @property
    def skipped_updates(self) -> Tensor:
        """How many updates of a matrix or dense parameter a non-finite gradient has cost since construction or the
        last ``load_state_dict``, without the steps that a ``GradScaler`` has skipped: int64 scalar on the parameters'
        device, so that reading it is the only sync."""
        counts = self._engine.skipped() + (self._layerwise.skipped() if self._layerwise is not None else [])
        if not counts:
            return torch.zeros((), dtype=torch.int64, device="cpu")
        return torch.stack([count.to(counts[0].device) for count in counts]).sum()

    @property
    def gradient_norm(self) -> Tensor | None:
        """The 2-norm of all finite gradients of the last step before clipping: float32 scalar on the first parameter's
        device. None without ``max_grad_norm``, and where no parameter had a gradient."""
        return self._engine.gradient_norm

    def backend_for(self, parameter: Tensor) -> Backend:
        """Which backend updates ``parameter``, "triton" or "reference", and why.

        Raises ValueError for a parameter that is not this optimizer's, and for "triton" where it cannot be had.
        """
        for param in params_of(self.param_groups):
            if param.tensor is parameter:
                settings = Settings.of(self.param_groups[param.group], f"parameter group {param.group}")
                return backend_of(parameter, settings, self.state.get(parameter, {}))
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not in this optimizer")

    def summary(self) -> Summary:
        """Which weights are low-rank and why the others are not, their state's bytes, launches and backend.

        It may be called before the first step, changes nothing, and is printed as a text:

        >>> layer = torch.nn.Linear(64, 256, bias=False)
        >>> print(APOLLOAdamW([{"params": [layer.weight], "rank": 16}]).summary())  # doctest: +ELLIPSIS
        Low-rank: 1 of 1 weights, 100% of the parameters
        ...
        """
        return summary_of(self.param_groups, self.state, self._reasons, self._layerwise)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``torch.amp.GradScaler`` may leave unscaling and skipping to ``step``, which then waits for nothing:
        if kernels update every parameter, none is a ``DTensor``, and none needs the step count on the host.

        Raises ValueError where layer-wise hooks are attached: ``GradScaler.step`` asks here, and must not go on."""
        if self._layerwise is not None:
            self._layerwise.refuse_grad_scaler()
        return may_leave_scaling(self.param_groups, self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group at any time; checked whole before anything changes. The given dictionary is not written to."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        taken = {group.get("name", "") for group in self.param_groups}
        parts, reasons = self._split.parts(param_group, taken)
        added = NewGroup.of_each(parts, self.param_groups, self.defaults)
        # Before anything changes, since warnings may be errors.
        ranked = param_group if self._split.rank is None else {"rank": self._split.rank} | param_group
        advise_on_keys(ranked, added[0].where)
        for new in added:
            advise_on_group(new.params, new.settings, new.lr, new.where)
            if not self._told_of_rounding and loses_updates(new.params, new.settings, new.lr):
                self._told_of_rounding = True
                advise_on_rounding(new.lr)
        before, unnamed = len(self.param_groups), []
        try:
            for new in added:
                unnamed += new.name_all(self.param_groups)
                super().add_param_group(new.group)
        except BaseException:
            del self.param_groups[before:]
            for group in unnamed:
                del group["param_names"]
            raise
        for group in self.param_groups[before:]:
            self._had_matrix.append(holds_matrix(group))
            place_learning_rate(group)
        self._reasons |= reasons

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of the same model, saved on any device, at any dtype; tensors are copied.

        Settings come from the checkpoint, with a warning where others were asked for. ``backend`` and ``capturable``
        stay as they are: they say where this run computes. Moments come to the group's ``state_dtype``, except if both
        are bfloat16 already, or to 8 bits where new ones would be; everything else comes to float32.

        Raises ValueError, and changes nothing, for another optimizer's state, other shapes, settings that are not
        allowed, and numbers from which training cannot continue.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dictionary, as state_dict() returns it, not {shown(state_dict)}")
        loaded: list[Loaded] = []

        def read(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            with torch.inference_mode(False), torch.no_grad():  # no step could change what is made under it
                new = read_state_dict(state_dict, self.param_groups)
                if self._layerwise is not None:
                    self._layerwise.check_settings(new.groups)
                for group in new.groups:
                    place_learning_rate(group)
            loaded.append(new)
            # torch.optim would cast and copy state. It gets none, and ``place`` puts ours into the empty dictionary.
            return {"state": {}, "param_groups": list(with_indices(new.groups))}

        def place(optimizer: Optimizer) -> None:
            self.state.update(loaded[-1].state)

        # Registered last and first: they see what other hooks made of the dictionary, and before other hooks look.
        handles = [
            self.register_load_state_dict_pre_hook(read),
            self.register_load_state_dict_post_hook(place, prepend=True),
        ]
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            for handle in handles:
                handle.remove()
        if self._layerwise is not None:
            self._layerwise.end_step()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what ``closure``, run with grad, returned.

        Raises ValueError or RuntimeError naming the parameter for a gradient it cannot use, before anything changes;
        ValueError also for a parameter that ``quantize_model`` or ``dequantize_model`` has replaced in its model.
        """
        check_groups(self.param_groups, self._had_matrix)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._layerwise is not None:
            self._layerwise.check_step()
        self._idle_steps.check(self.param_groups, () if self._layerwise is None else self._layerwise.updated())
        grad_scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        if not isinstance(found_inf, Tensor):  # the integer 0 is a GradScaler's sum over no gradients
            found_inf = None
        scaling = Scaling(grad_scale, found_inf)
        self._engine.run(self.param_groups, self.state, scaling)
        self._caches.projections.end_step()
        if self._layerwise is not None:
            self._layerwise.end_step()
        return loss


# Without what belongs to low-rank groups, which is no default of all: a rank would make dense groups low-rank.
_DEFAULTS = {
    name: argument.default
    for name, argument in inspect.signature(APOLLOAdamW.__init__).parameters.items()
    if name in FIELD_NAMES and name not in ("rank", *LOW_RANK_DEFAULTS)
}
