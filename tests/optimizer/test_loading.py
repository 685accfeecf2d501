"""What ``load_state_dict`` makes of a good dictionary: dtypes, what belongs to the run, and what it warns of."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from broken_state import everything, make, same, train
from tiers import INTERPRETER_FULL
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from apollo_triton import APOLLOAdamW, apollo_param_groups, attach_layerwise
from apollo_triton.params.state import lay_out

FLOAT, HALF, BFLOAT, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64
MOMENTS = ("exp_avg", "exp_avg_sq")


def saved(**options):
    optimizer, _ = make(steps=2, backend="reference", **options)
    return copy.deepcopy(optimizer.state_dict())


def loaded(state_dict, **options):
    optimizer, named = make(seed=1, **options)
    optimizer.load_state_dict(state_dict)
    return optimizer, named


def cast(state_dict, dtype, names):
    """Every float tensor of these names is cast."""
    for state in state_dict["state"].values():
        for name in names:
            if name in state and state[name].dtype != torch.uint8:
                state[name] = state[name].to(dtype)
    return state_dict


OTHERS = ("update_norm", "projection", "exp_avg_absmax", "exp_avg_sq_absmax")


@pytest.mark.parametrize(
    ("dtype", "names", "moments"),
    [
        (HALF, MOMENTS[:1], FLOAT),
        (BFLOAT, MOMENTS[1:], FLOAT),
        (DOUBLE, (*MOMENTS, *OTHERS, "step"), FLOAT),
        (HALF, (*MOMENTS, *OTHERS, "step"), FLOAT),
        (BFLOAT, (*MOMENTS, *OTHERS, "step"), BFLOAT),
    ],
)
def test_state_comes_to_the_dtypes_that_kernels_read(dtype, names, moments):
    """A kernel reads two moments of one dtype, and all else as float32: other dtypes are other numbers to it, or memory
    behind the tensor's end."""
    state_dict = cast(saved(), dtype, names)
    optimizer, named = loaded(state_dict)
    for state, given in zip(map(optimizer.state.get, named.values()), state_dict["state"].values(), strict=True):
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                bits8 = value.dtype == torch.uint8
                expected = torch.uint8 if bits8 else moments if name in MOMENTS else FLOAT
                assert state[name].dtype == expected, name
                assert torch.equal(state[name], value.to(expected)), name
                assert state[name].data_ptr() != value.data_ptr()
    train(optimizer, named, 2)


@pytest.mark.parametrize("kept", [BFLOAT, FLOAT])
def test_moments_come_to_the_dtype_of_their_group(kept):
    """Of float32 moments in a group that asks for bfloat16, the next step would otherwise make twice the memory."""
    state_dict = cast(saved(state_dtype=kept), DOUBLE, MOMENTS)
    optimizer, _ = loaded(state_dict, state_dtype=kept)
    found = {state.get("exp_avg", state.get("exp_avg_q")).dtype for state in optimizer.state.values()}
    assert found == {kept, torch.uint8}


# --- what belongs to the run


def test_backend_and_capturable_are_the_run_s():
    """Saved by the kernels and loaded where they cannot run, a step would ask for them."""
    state_dict = saved()
    for group in state_dict["param_groups"]:
        group |= {"backend": "triton", "capturable": True, "lr": torch.tensor(group["lr"])}
    optimizer, named = loaded(state_dict, backend="reference")
    train(optimizer, named, 2)
    for group in optimizer.param_groups:
        assert (group["backend"], group["capturable"]) == ("reference", False)
        assert type(group["lr"]) is float


def test_a_capturable_run_stays_one():
    optimizer, _ = loaded(saved(), capturable=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert all(isinstance(rate, torch.Tensor) and rate.dtype == FLOAT for rate in rates)
    assert all(group["capturable"] for group in optimizer.param_groups)


def test_each_group_gets_a_tensor_of_its_own():
    """``torch.optim`` copies groups together, so that one tensor stays one, and schedulers act on it twice."""
    state_dict, rate = saved(), torch.tensor(1e-2)
    for group in state_dict["param_groups"]:
        group["lr"] = rate
    optimizer, _ = loaded(state_dict)
    addresses = {group["lr"].data_ptr() for group in optimizer.param_groups}
    assert len(addresses) == len(optimizer.param_groups)
    assert rate.data_ptr() not in addresses


@pytest.mark.parametrize(
    "come_back",
    [
        lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()) or optimizer,
        copy.deepcopy,
        lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    ],
    ids=["loaded", "copied", "pickled"],
)
@pytest.mark.parametrize("is_old", [False, True], ids=["", "with the key"])
def test_no_group_has_a_key_that_a_new_one_has_not(come_back, is_old):
    """torch.optim's own 'differentiable', for which a second torch.distributed.checkpoint.load then looks."""
    optimizer, _ = make(steps=1)
    keys = [list(group) for group in optimizer.param_groups]
    defaults = list(optimizer.defaults)
    for group in [*optimizer.param_groups, optimizer.defaults] if is_old else []:
        group["differentiable"] = False
    other = come_back(optimizer)
    other.add_param_group({"params": [("new", nn.Parameter(torch.ones(4)))]})
    found = [sorted(group) for group in other.param_groups]
    assert found == [*map(sorted, keys), sorted(keys[-1])]
    assert sorted(other.defaults) == sorted(defaults)


@pytest.mark.parametrize("flattens", [False, True])
def test_one_distributed_checkpoint_is_loaded_twice(flattens, tmp_path):
    """What a load leaves in the groups is looked for in the file by the next one."""
    options = StateDictOptions(flatten_optimizer_state_dict=flattens)
    models = [nn.ModuleDict({"attn": nn.Linear(32, 64), "norm": nn.LayerNorm(32)}) for _ in range(2)]
    optimizers = [APOLLOAdamW(apollo_param_groups(model, rank=2)) for model in models]
    for parameter in models[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    dcp.save({"optimizer": get_optimizer_state_dict(models[0], optimizers[0], options=options)}, checkpoint_id=tmp_path)
    for _ in range(2):
        state_dict = {"optimizer": get_optimizer_state_dict(models[1], optimizers[1], options=options)}
        dcp.load(state_dict, checkpoint_id=tmp_path)
        set_optimizer_state_dict(models[1], optimizers[1], state_dict["optimizer"], options=options)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(optimizers[0].state[one]["exp_avg"], optimizers[1].state[other]["exp_avg"])


@pytest.mark.parametrize("missing", ["capturable", "rank_above_width", "stochastic_rounding", "lr", "scale"])
def test_keys_that_older_checkpoints_have_not_stay_as_asked(missing):
    state_dict = saved()
    for group in state_dict["param_groups"]:
        group.pop(missing, None)
    optimizer, named = make(seed=1, stochastic_rounding=True)
    before = [group.get(missing) for group in optimizer.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.load_state_dict(state_dict)
    assert [group.get(missing) for group in optimizer.param_groups] == before
    train(optimizer, named, 2)


def test_an_optimizer_pickled_by_an_older_version_gets_today_s_defaults():
    optimizer, named = make(steps=1)
    for group in [*optimizer.param_groups, optimizer.defaults]:
        del group["capturable"]
    other, again = pickle.loads(pickle.dumps((optimizer, named)))
    train(other, again, 1)
    assert other.defaults["capturable"] is False


@pytest.mark.parametrize("backend", INTERPRETER_FULL, indirect=True)
def test_scalars_on_the_host_are_brought_home(backend):
    """``ZeroRedundancyOptimizer.load_state_dict`` moves every scalar of the state to the CPU."""
    ends = []
    for on_host in (False, True):
        optimizer, named = make(steps=1)
        if on_host:
            for state in optimizer.state.values():
                state |= {n: v.cpu() for n, v in state.items() if isinstance(v, torch.Tensor) and v.dim() == 0}
        train(optimizer, named, 1)
        ends.append([parameter.detach() for parameter in named.values()])
    assert all(map(torch.equal, *ends))
    state = {"update_norm": torch.ones(()), "exp_avg": torch.ones((), device="meta")}
    lay_out(state, torch.empty((), device="meta"), is_low_rank=True)
    assert {value.device.type for value in state.values()} == {"meta"}


# --- around a load


def test_layer_wise_updates_refuse_settings_that_they_have_not_before_they_are_loaded():
    """Otherwise backward raises after the layers behind it have moved."""
    layer = nn.Linear(6, 8, bias=False)
    optimizer = APOLLOAdamW([{"params": [layer.weight], "rank": 2}])
    attach_layerwise(layer, optimizer)
    before = everything(optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match=r"parameter group 0: max_grad_norm=1\.0 needs the norm of all gradients"):
        optimizer.load_state_dict(state_dict)
    assert same(everything(optimizer), before)


def test_hooks_run_in_their_order_around_a_load():
    """Hooks before see what was given, and may change it; hooks after see what was loaded."""
    optimizer, named = make(seed=1)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, given: seen.append("first") or {**given, "mark": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, given: seen.append(given["mark"]))
    optimizer.register_load_state_dict_post_hook(lambda each: seen.append(each.state[named["up"]]["step"].item()))
    optimizer.register_load_state_dict_post_hook(lambda each: seen.append("last"))
    optimizer.load_state_dict(saved())
    assert seen == ["first", 1, 2.0, "last"]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 2


@pytest.mark.parametrize("given", [None, 3, [], "x"])
def test_what_is_no_dictionary_is_a_type_error(given):
    optimizer, _ = make(steps=1)
    before = everything(optimizer)
    with pytest.raises(TypeError, match="state_dict must be a dictionary"):
        optimizer.load_state_dict(given)
    assert same(everything(optimizer), before)
