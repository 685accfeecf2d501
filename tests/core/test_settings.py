"""``SettingsReader``: a value that changed and is not read again would train on with the old one."""

from __future__ import annotations

import pytest
import torch

from apollo_triton import APOLLOAdamW
from apollo_triton.core.settings import Settings, SettingsReader


@pytest.fixture
def group():
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    return APOLLOAdamW([{"params": [weight], "rank": 2}]).param_groups[0]


def test_unchanged_groups_are_not_checked_again(group):
    reader = SettingsReader()
    first = reader.read(group, "")
    assert first == Settings.of(group)
    assert reader.read({**group}, "") is first


@pytest.mark.parametrize(("name", "value"), [("lr", 0.5), ("betas", (0.5, 0.6)), ("rank", 3), ("scale", 2.0)])
def test_a_changed_value_is_read(group, name, value):
    reader = SettingsReader()
    reader.read(group, "")
    group[name] = value
    assert getattr(reader.read(group, ""), name) == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_that_change_in_place_are_read_every_time(group, dtype):
    group["lr"], group["betas"] = torch.tensor(0.1, dtype=dtype), [0.9, 0.99]
    reader = SettingsReader()
    reader.read(group, "")
    group["lr"].fill_(0.25)
    group["betas"][0] = 0.5
    settings = reader.read(group, "")
    assert settings.lr == 0.25
    assert settings.betas == (0.5, 0.99)


def test_a_value_that_is_refused_is_refused_again(group):
    reader = SettingsReader()
    reader.read(group, "")
    group["eps"] = -1.0
    for _ in range(2):
        with pytest.raises(ValueError, match="parameter group 3: Invalid epsilon value"):
            reader.read(group, "parameter group 3")
    group["eps"] = 1e-6
    assert reader.read(group, "") == Settings.of(group)
