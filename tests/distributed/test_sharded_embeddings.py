"""``embeddings=`` of a model that FSDP2 shards by rows, beside one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_cases import assert_ranks_agree, needs_fsdp_on_a_cpu
from distributed_harness import run
from savings_cases import VOCABULARY, WIDTH, Saving, beside_one_process

pytestmark = [needs_fsdp_on_a_cpu, pytest.mark.slow]


def trained(gradients: str) -> dict[str, Any]:
    return beside_one_process("FSDP2", Saving(gradients, embeddings="rows"), steps=3)


@pytest.mark.parametrize("gradients", ["freed", pytest.param("kept", marks=pytest.mark.full)])
def test_sharded_embeddings_are_those_of_one_process(gradients: str) -> None:
    """Kinds that a shard does not tell, and second moments of the rows of another rank."""
    results = run(trained, 2, gradients=gradients)
    assert_ranks_agree([result["ours"] for result in results])
    ours, theirs, start = (results[0][which] for which in ("ours", "theirs", "start"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert ours[f"{name}.exp_avg_sq"].shape == (VOCABULARY, 1)
        assert ours[f"{name}.exp_avg"].shape == (VOCABULARY, WIDTH)
        assert not torch.equal(ours[name], start[name])
    for name, value in theirs.items():  # float32 sums in another order
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)
