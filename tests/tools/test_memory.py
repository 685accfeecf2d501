"""``apollo-triton memory``: counts against the state of real optimizers, and what it prints."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, ViTConfig

from apollo_triton import APOLLOAdamW, quantize_model
from apollo_triton.cli import main
from apollo_triton.tools import llama, options
from apollo_triton.tools.llama import meta_model
from apollo_triton.tools.memory import command as memory
from apollo_triton.tools.memory.count import adamw, adamw_8bit, apollo, apollo_mini

# q to o have 64 x 64 = 4096 elements, the least that is 8-bit; the MLP's 64 x 60 fewer; 101 x 64 is no whole block.
CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=60,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=101,
    tie_word_embeddings=False,
)


def call(*arguments):
    parser = argparse.ArgumentParser()
    options.memory(parser)
    return memory.run(parser.parse_args(arguments))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    CONFIG.save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return str(folder / "config.json")


def stepped(model, optimizer):
    """Bytes of the optimizer's state after a real step: the moments', and everything else's."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    # By storage: bitsandbytes' maps are one tensor in every parameter's state, and a view keeps all of its base.
    storages = {
        x.untyped_storage().data_ptr(): (name, x.untyped_storage().nbytes())
        for state in optimizer.state.values()
        for name, x in state.items()
        if isinstance(x, torch.Tensor)
    }
    moments = [size for name, size in storages.values() if name in MOMENTS]
    return sum(moments), sum(size for _, size in storages.values()) - sum(moments)


MOMENTS = ("exp_avg", "exp_avg_sq", "exp_avg_q", "exp_avg_sq_q", "state1", "state2")
BFLOAT16 = {"rank": 4, "target_modules": ["q_proj", "mlp"], "state_dtype": torch.bfloat16}
EIGHT = {"rank": 40, "target_modules": ["q_proj", "mlp"], "state_bits": 8, "min_8bit_size": 2500}
SVD = {"rank": 4, "target_modules": "all-linear", "proj": "svd"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "make"),
    [
        (adamw, lambda model: torch.optim.AdamW(model.parameters())),
        (lambda model: apollo(model, rank=8), lambda model: APOLLOAdamW.apollo(model, rank=8)),
        (apollo_mini, APOLLOAdamW.mini),
        (lambda model: apollo(model, **BFLOAT16), lambda model: APOLLOAdamW.apollo(model, **BFLOAT16)),
        (lambda model: apollo(model, **EIGHT), lambda model: APOLLOAdamW.apollo(model, **EIGHT)),
        (lambda model: apollo(model, **SVD), lambda model: APOLLOAdamW.apollo(model, **SVD)),
    ],
    ids=["adamw", "apollo", "mini", "bfloat16", "8-bit", "svd"],
)
def test_the_count_is_what_a_real_step_allocates(config_file, count, make, dtype):
    """Counted on the meta device from the config file, against real tensors of a model of the same config."""
    counted = count(meta_model(config_file, dtype))
    model = LlamaForCausalLM(CONFIG).to(dtype)
    assert (counted.moments, counted.other) == stepped(model, make(model))
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
    gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters())
    assert (counted.weights, counted.gradients) == (weights, gradients)


def test_adamw_8bit_is_what_bitsandbytes_allocates(config_file):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = LlamaForCausalLM(CONFIG)
    counted = adamw_8bit(meta_model(config_file, torch.float32))
    assert (counted.moments, counted.other) == stepped(model, bitsandbytes.optim.AdamW8bit(model.parameters()))


def test_experts_and_frozen_weights():
    """An ``update_norm`` per expert; neither gradient nor state for what is not trained, which has weights still."""
    model = nn.ModuleDict({"mlp": nn.Linear(8, 16), "embedding": nn.Embedding(70, 8)})
    model["mlp"].experts = nn.Parameter(torch.randn(3, 8, 16))
    model["embedding"].weight.requires_grad = False
    for count, optimizer in (
        (apollo(model, rank=2), APOLLOAdamW.apollo(model, rank=2)),
        (adamw(model), torch.optim.AdamW(model.parameters())),
    ):
        assert (count.moments, count.other) == stepped(model, optimizer)
        trained = 16 * 8 + 16 + 3 * 8 * 16
        assert (count.weights, count.gradients) == (4 * (trained + 70 * 8), 4 * trained)


def test_tied_embeddings_are_counted_once(config_file, tmp_path):
    LlamaConfig(**CONFIG.to_dict() | {"tie_word_embeddings": True}).save_pretrained(tmp_path)
    tied, untied = adamw(meta_model(str(tmp_path))), adamw(meta_model(config_file))
    assert untied.weights - tied.weights == 2 * 101 * 64
    assert untied.moments - tied.moments == 2 * 2 * 101 * 64


@pytest.mark.parametrize("arguments", [(), ("--model", "7B"), ("--paper",)], ids=["summary", "exact", "paper"])
def test_the_output_fits_a_small_terminal_and_is_what_the_documentation_shows(capsys, arguments):
    assert call(*arguments) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    assert output in (Path(__file__).parents[2] / "docs/memory.md").read_text()


def test_exact_bytes_with_totals(capsys, config_file):
    """The table's columns add up, and say what the library says; names of sizes are case-insensitive."""
    call("--model", "1b", config_file, "--rank", "16", "--dtype", "float32", "--state-dtype", "bfloat16")
    first, second = (part.splitlines() for part in capsys.readouterr().out.split("\n\n", 4)[1::3])
    model = meta_model("1B", torch.float32)
    counts = [
        adamw(model),
        adamw_8bit(model),
        apollo(model, 16, state_dtype=torch.bfloat16),
        apollo_mini(model, state_dtype=torch.bfloat16),
    ]
    rows = {line.split()[0]: line.split()[1:] for line in first[1:6]}
    numbers = {part: [int(text.replace(",", "")) for text in row] for part, row in rows.items()}
    for part in ("weights", "gradients", "moments", "other", "total"):
        assert numbers[part] == [getattr(count, part) for count in counts]
    assert [sum(column) for column in zip(*list(numbers.values())[:4], strict=True)] == numbers["total"]
    assert first[6].split()[2:] == [f"{count.total / 1e9:.3f}" for count in counts]
    assert "APOLLO r=16" in first[0]
    assert second[0].startswith("bytes")


def test_json_is_exact_and_takes_every_option(capsys, config_file):
    call("--json", "--model", config_file, "--rank", "4", "--target-modules", "all-linear")
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["rank"], report["dtype"]) == ("LlamaForCausalLM", 4, "bfloat16")
    count = apollo(meta_model(config_file), 4, target_modules="all-linear")
    assert report["methods"]["APOLLO"] == {
        "weights": count.weights,
        "gradients": count.gradients,
        "moments": count.moments,
        "other": count.other,
        "total": count.total,
    }
    call("--json", "--model", config_file, "--rank", "4", "--target-modules", "q_proj", ".*mlp.*")
    (fewer,) = json.loads(capsys.readouterr().out)
    assert fewer["methods"]["APOLLO"]["moments"] > count.moments  # k, v and o are dense again
    call("--json", "--paper")
    assert len(json.loads(capsys.readouterr().out)) == 23


def state_of(capsys, *arguments):
    """The bytes of Mini's state for LLaMA-60M."""
    assert main(["memory", "60M", "--json", *arguments]) == 0
    mini = json.loads(capsys.readouterr().out)[0]["methods"]["APOLLO-Mini"]
    return mini["moments"] + mini["other"]


def test_embeddings_are_counted_as_they_are_kept(capsys):
    """An option that is read and not passed on. Embedding and head have 32000 rows of 512 elements each: in 8 bits a
    byte an element and 4 for every 256, and 4 a row."""
    elements = 32000 * 512
    of_rest = state_of(capsys) - 2 * 8 * elements
    assert state_of(capsys, "--embeddings", "rows-8bit") == of_rest + 2 * (elements + elements // 64 + 4 * 32000)
    assert main(["memory", "60M", "--embeddings", "rows"]) == 0
    assert "Embeddings and head with embeddings='rows'." in " ".join(capsys.readouterr().out.split())
    assert main(["memory", "--paper", "--embeddings", "rows"]) == 2
    assert "--paper has the paper's own settings: leave out --embeddings" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["60M"], ["60m", "--json"], ["--json", "60M"]])
def test_the_model_may_be_given_without_its_option(given, capsys):
    """``memory 7B``, the first that a user types: "unrecognized arguments"."""
    assert main(["memory", *given]) == 0
    assert "58073600" in capsys.readouterr().out.replace(",", "")


def test_models_without_and_with_the_option_are_one_list(capsys):
    assert main(["memory", "--json", "60M", "--model", "130M"]) == 0
    assert [report["model"] for report in json.loads(capsys.readouterr().out)] == ["130M", "60M"]
    assert main(["memory", "7B", "--paper"]) == 2
    assert "--paper has the paper's own settings: leave out --model" in capsys.readouterr().err


@pytest.mark.parametrize(("width", "rank"), [(64, 16), (128, 32), (1024, 256), (4096, 256)])
def test_the_default_rank_of_a_model_is_a_quarter_of_its_width(width, rank, tmp_path, capsys):
    """256 for a model of width 128: an error which names no option."""
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 1, "head_dim": width}
    LlamaConfig(**sizes, num_key_value_heads=1, num_hidden_layers=1, vocab_size=200).save_pretrained(tmp_path)
    call("--json", "--model", str(tmp_path))
    (report,) = json.loads(capsys.readouterr().out)
    assert report["rank"] == rank


def test_a_rank_or_targets_that_cannot_be_name_their_options(config_file):
    for arguments in (["--rank", "65"], ["--target-modules", "nothing"]):
        with pytest.raises(ValueError, match=r"config.json: .*\(the options are --target-modules, and --rank, here "):
            call("--model", config_file, *arguments)
    with pytest.raises(ValueError, match="--rank -3: it must be an integer of 1 or more"):
        call("--model", config_file, "--rank", "-3")


def test_the_note_names_what_stays_dense(tmp_path, capsys):
    """OPT's MLP, fc1 and fc2, which targets of attention do not match: "embeddings, head" were blamed for it. A state
    above AdamW's without a word on what helps."""
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 3}
    OPTConfig(**sizes, num_attention_heads=4, vocab_size=101).save_pretrained(tmp_path)
    call("--model", str(tmp_path), "--target-modules", "attn")
    shown = " ".join(capsys.readouterr().out.split())
    share = 2 * 64 * 256 / (2 * 64 * 256 + 4 * 64 * 64)  # of fc1 and fc2 beside q, k, v and out
    assert f"{share:.0%} of the weights stay dense with APOLLO: " in shown
    names = "model.decoder.layers.*.fc1.weight, model.decoder.layers.*.fc2.weight."
    assert f"dense with APOLLO: {names} --target-modules chooses others." in shown
    assert "nearly all of it for what is not projected (embeddings, other matrices). That is more: --state" in shown
    call("--model", str(tmp_path), "--target-modules", "fc")
    names = ", ".join(f"model.decoder.layers.*.self_attn.{name}_proj.weight" for name in ("k", "v", "q", "out"))
    assert f"{1 - share:.0%} of the weights stay dense with APOLLO: {names}." in " ".join(
        capsys.readouterr().out.split()
    )
    for targets in (["--target-modules", "self_attn", "fc"], ["--target-modules", "auto"], []):
        call("--model", str(tmp_path), *targets)
        assert "stay dense" not in capsys.readouterr().out


@pytest.mark.slow
def test_patches_and_positions_are_embeddings_below_the_table(tmp_path, capsys):
    """For ViT the sentence below the table said that 61 % stay dense, and not 53 %."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ViTConfig(**sizes, image_size=32, patch_size=8).save_pretrained(tmp_path)
    call("--model", str(tmp_path), "--target-modules", "mlp")
    out, err = capsys.readouterr()
    attention, mlp, pooler = 2 * 4 * 64 * 64, 2 * 2 * 64 * 128, 64 * 64
    share = f"{(attention + pooler) / (attention + mlp + pooler):.0%}"
    assert f"{share} of the weights stay dense with APOLLO: layers.*.attention.q_proj" in " ".join(out.split())
    assert "patch_embeddings" not in out + err


def test_default_ranks_are_the_papers(capsys):
    call("--json")
    reports = json.loads(capsys.readouterr().out)
    ranks = {report["model"]: report["rank"] for report in reports}
    assert ranks == {"60M": 128, "130M": 192, "350M": 256, "1B": 512, "7B": 256, "13B": 256}


def test_models_without_a_language_head_count_too(tmp_path):
    from transformers import ViTConfig

    ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64).save_pretrained(
        tmp_path
    )
    assert type(meta_model(str(tmp_path))).__name__ == "ViTModel"


def test_wrong_models_are_named_with_what_is_allowed(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'70M' \(allowed: 60M, .*7B, 13B, 33B, 70B, 405B, the path of a config.json"):
        meta_model("70M")
    with pytest.raises(FileNotFoundError, match=r"no './nothing.json'"):
        meta_model("./nothing.json")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a config that transformers can read: "):
        meta_model(str(tmp_path))
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"'nobody/nothing' could not be fetched .*give the path of its config\.json"
    ) as error:
        meta_model("nobody/nothing")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "hidden size .100. is not a multiple|hidden_size"),
        ({"hidden_size": "big"}, r"'hidden_size' is 'big' \(allowed: an integer of 1 or more\)"),
        ({"hidden_size": 64, "num_attention_heads": 0}, r"'num_attention_heads' is 0 \(allowed: an integer of 1 to"),
        ({"head_dim": -64}, "negative dimension|-64"),
        # small enough to be made, and too large to be counted: its moments, or those of all weights
        ({"vocab_size": 2**45, "num_hidden_layers": 1}, r"embed_tokens.weight has \d+ elements .allowed: up to"),
    ],
)
def test_a_config_with_a_wrong_value_is_one_line_that_names_the_file(tmp_path, changes, message):
    """What transformers and torch raise then is of many kinds."""
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({"model_type": "llama", **changes}))
    with pytest.raises(ValueError, match=message) as error:
        meta_model(str(path))
    assert "odd.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_network_the_hub_is_asked_once(monkeypatch):
    """The hub's own client tries for half a minute, and prints every try."""
    import urllib.request
    from urllib.error import URLError

    import huggingface_hub

    asked = []

    def no_network(address, timeout):
        asked.append(address)
        raise URLError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    llama._hub_answers.cache_clear()
    for _ in range(2):
        with pytest.raises(OSError, match="could not be fetched"):
            meta_model("nobody/nothing")
    llama._hub_answers.cache_clear()
    assert len(asked) == 1


@pytest.mark.slow
def test_a_reader_that_has_gone_ends_the_command_silently():
    """apollo-triton memory | head"""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "import sys; from apollo_triton.cli import main; sys.exit(main(['env']))"]
    found = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (found.returncode, found.stderr) == (141, "")


def test_ranks_and_options_that_cannot_be(capsys, config_file):
    with pytest.raises(ValueError, match="narrower than rank 65"):
        call("--model", config_file, "--rank", "65")
    with pytest.raises(ValueError, match="--rank 0: it must be an integer of 1 or more"):
        call("--model", config_file, "--rank", "0")
    with pytest.raises(ValueError, match="leave out --state-dtype"):
        call("--paper", "--state-dtype", "bfloat16")
    assert call("--model", config_file, "--rank", "62") == 0
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1
    assert "6 targeted weights are narrower than rank 62 and stay dense" in notes[0]


def test_the_table_of_int8_weights_is_what_is_counted():
    text = (Path(__file__).parents[2] / "docs" / "int8.md").read_text(encoding="utf-8")
    rows = text.partition("<!-- memory -->")[2].partition("<!-- end of memory -->")[0].strip().splitlines()[2:]
    plain, int8 = meta_model("7B"), quantize_model(meta_model("7B"))
    largest = max(parameter.numel() * parameter.element_size() for parameter in int8.parameters())
    options = {}, {"state_dtype": torch.bfloat16}, {"state_bits": 8}
    layerwise = [replace(apollo_mini(int8, **each), gradients=largest) for each in options]
    expected = [adamw(plain), apollo_mini(plain), apollo_mini(int8), *layerwise]
    for row, each in zip(rows, expected, strict=True):
        figures = [f"{size / 1e9:.2f} GB" for size in (each.weights, each.gradients, each.state, each.total)]
        assert row.strip("|").split(" | ")[1:] == [*figures[:3], figures[3] + " "], row
