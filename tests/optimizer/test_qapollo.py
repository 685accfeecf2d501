"""QAPOLLOAdamW: the official signature and defaults, and nothing that is taken without being used."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from apollo_triton import APOLLOAdamW, QAPOLLOAdamW, quantize_model

KEYS = {"rank": 16, "proj": "random", "proj_type": "std", "scale_type": "channel", "scale": 1.0, "update_proj_gap": 200}


def test_the_signature_is_the_official_one():
    official = pytest.importorskip("apollo_torch").QAPOLLOAdamW
    theirs, ours = (inspect.signature(kind).parameters for kind in (official, QAPOLLOAdamW))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert list(ours)[len(theirs) :] == ["options"]
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name


def test_it_is_apollo_with_other_defaults():
    """Arguments that end at the wrong place: every one at a value of its own, by position."""
    starts = torch.randn(24, 32), torch.randn(8)
    ends = []
    for make in (
        lambda groups: QAPOLLOAdamW(
            groups, 0.1, (0.8, 0.95), 1e-3, 0.2, False, 8, None, 90, 100, True, False, True, True, seed=3
        ),
        lambda groups: APOLLOAdamW(
            groups, lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, scale_front=True, state_bits=8,
            min_8bit_size=90, seed=3,
        ),
    ):  # fmt: skip
        weight, vector = (nn.Parameter(start.clone()) for start in starts)
        optimizer = make([{"params": [weight], **KEYS}, {"params": [vector]}])
        for _ in range(3):
            weight.grad, vector.grad = weight.detach().sin(), vector.detach().cos()
            optimizer.step()
        assert "exp_avg_q" in optimizer.state[weight]
        ends.append((weight.detach(), vector.detach()))
    for ours, expected in zip(*ends, strict=True):
        assert torch.equal(ours, expected)
    plain = QAPOLLOAdamW([nn.Parameter(torch.ones(3))]).param_groups[0]
    assert (plain["lr"], plain["eps"], plain["weight_decay"], plain["state_bits"]) == (1e-3, 1e-8, 1e-2, 32)


def test_int8_weights_train():
    torch.manual_seed(0)
    model = quantize_model(nn.ModuleDict({"mlp": nn.Linear(32, 128)}), group_size=32)
    optimizer = QAPOLLOAdamW.apollo(model, 16, lr=1e-2, optim_bits=8, min_8bit_size=100)
    x, target = torch.randn(64, 32), torch.randn(64, 128)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model["mlp"](x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert "exp_avg_q" in optimizer.state[model["mlp"].weight]


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ({"amsgrad": True}, r"Invalid amsgrad: True \(allowed: False\)"),
        ({"args": object()}, "Invalid args"),
        ({"percentile_clipping": 5}, "clip with max_grad_norm"),
        ({"block_wise": False}, "blockwise"),
        ({"is_paged": True}, "Invalid is_paged: True"),
        ({"optim_bits": 16}, r"Invalid optim_bits: 16 \(allowed: 32 or 8\)"),
        ({"min_8bit_size": -1}, r"Invalid min_8bit_size: -1 \(allowed: an integer of 0 or more\)"),
    ],
)
def test_what_would_be_ignored_is_refused(argument, advice):
    with pytest.raises(ValueError, match=advice):
        QAPOLLOAdamW([nn.Parameter(torch.ones(3))], **argument)
