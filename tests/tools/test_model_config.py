"""Configs that somebody else wrote: no code of theirs runs, nothing is fetched, absurd sizes are refused by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apollo_triton.cli import main
from apollo_triton.tools import bounds, model_config
from apollo_triton.tools.llama import meta_model
from apollo_triton.tools.model_config import checked

pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}
LLAMA = {"model_type": "llama", **SMALL}


def written(folder: Path, config: object) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


# It leaves a file where a class of it is defined.
OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
(Path(__file__).parent / "ran").touch()
Path(MARK).touch()
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""
MAP = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoModel": "own.Model"}


@pytest.mark.parametrize(
    ("config", "status"),
    [
        ({"model_type": "own", "auto_map": MAP}, 2),
        ({**LLAMA, "auto_map": MAP}, 0),
        pytest.param(
            {"model_type": "llava", "text_config": {**LLAMA, "auto_map": MAP}, "vision_config": {"auto_map": MAP}},
            0,
            marks=pytest.mark.full,  # it imports a second model
        ),
    ],
    ids=["unknown", "known", "nested"],
)
@pytest.mark.parametrize("option", [(), pytest.param(("--single-card",), marks=pytest.mark.full)], ids=["", "card"])
def test_code_of_the_folder_never_runs(config, status, option, tmp_path, monkeypatch, capsys):
    """A config.json whose auto_map is answered by "y" on standard input, here and in a nested config."""
    import transformers.dynamic_module_utils as dynamic

    mark = tmp_path / "it ran"
    (tmp_path / "own.py").write_text(OWN_CODE.replace("MARK", repr(str(mark))))
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    monkeypatch.setattr(dynamic, "get_class_from_dynamic_module", lambda *given, **more: mark.touch())
    found = main(["memory", "--model", written(tmp_path, config), *option])
    said = capsys.readouterr().err
    assert not mark.exists()
    assert found == status or option
    if found == status:
        assert ("(auto_map) is never run here" if status else "(auto_map), which is not run") in said


KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


@pytest.mark.parametrize("key", [*KERNELS, "experts_implementation", "_experts_implementation"])
@pytest.mark.parametrize("where", ["outside", pytest.param("nested", marks=pytest.mark.full)])
def test_no_kernel_of_the_hub_is_asked_for(key, where, tmp_path, monkeypatch):
    """ "owner/kernel", which transformers would fetch and import."""
    import transformers.modeling_utils as modeling

    asked = []
    for name in ("load_and_register_attn_kernel", "lazy_import_flash_attention", "get_kernel"):
        monkeypatch.setattr(modeling, name, lambda *given, **more: asked.append(given), raising=False)
    config = {**LLAMA, key: "owner/kernel"}
    if where == "nested":
        config = {"model_type": "llava", "text_config": config, "vision_config": {key: "owner/kernel"}}
    model = meta_model(written(tmp_path, config))
    for module in model.modules():
        of_module = getattr(module, "config", None)
        assert getattr(of_module, "_attn_implementation", None) in (None, "eager", "sdpa"), module
        assert "owner" not in str(getattr(of_module, "_experts_implementation", "")), module
    assert not asked


def test_a_model_that_needs_a_library_is_one_line(tmp_path, monkeypatch, capsys):
    """transformers' ImportError of several lines, which is no ModuleNotFoundError, as a traceback."""
    import transformers

    def needs(*given, **more):
        raise ImportError("\nDetrModel requires the timm library but it was not found.\nInstall it")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", needs)
    assert main(["memory", written(tmp_path, LLAMA)]) == 2
    said = capsys.readouterr().err
    assert said == f"apollo-triton memory: '{tmp_path}': DetrModel requires the timm library but it was not found.\n"


def test_keys_that_load_or_cast_are_ignored(tmp_path):
    """A quantization that needs a library, a dtype that is any name of torch, code by the name of its repository."""
    odd = {
        "quantization_config": {"quant_method": "fp8"},
        "torch_dtype": "load",
        "dtype": "hub",
        "trust_remote_code": True,
        "_name_or_path": "owner/code",
        "use_kernels": True,
    }
    plain, other = meta_model(written(tmp_path, LLAMA)), meta_model(written(tmp_path, LLAMA | odd))
    shapes = [(name, p.shape, p.dtype) for name, p in plain.named_parameters()]
    assert [(name, p.shape, p.dtype) for name, p in other.named_parameters()] == shapes
    assert checked(LLAMA | odd, "m")[0] == LLAMA


def test_a_backbone_is_not_fetched(tmp_path):
    with pytest.raises(ValueError, match="'backbone' is 'owner/resnet', another model, which is not fetched"):
        meta_model(written(tmp_path, {"model_type": "detr", "backbone": "owner/resnet"}))


ABSURD = [
    ({"num_hidden_layers": 20_000}, "'num_hidden_layers' is 20000 .allowed: an integer of 1 to 1000"),
    ({"num_hidden_layers": 10**7}, "'num_hidden_layers' is 10000000"),
    ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
    ({"num_hidden_layers": -3}, "'num_hidden_layers' is -3"),
    ({"num_hidden_layers": "2"}, "'num_hidden_layers' is '2'"),
    ({"num_hidden_layers": float("nan")}, "'num_hidden_layers' is nan"),
    ({"num_hidden_layers": True}, "'num_hidden_layers' is True"),
    ({"num_hidden_layers": 10**100}, "'num_hidden_layers' is an integer of 333 bits"),
    ({"num_labels": 10**8}, "'num_labels' is 100000000 .allowed: an integer of 0 to 100000"),
    ({"hidden_size": -64}, "'hidden_size' is -64 .allowed: an integer of 1 or more"),
    ({"num_local_experts": 10**6}, "'num_local_experts' is 1000000"),
    ({"num_hidden_layers": 900, "num_local_experts": 5000}, "is 900 and num_local_experts is 5000 .allowed: a product"),
    ({"depths": [2] * 5000}, "'length of depths' is 5000"),
    ({"encoder_layers": 9e9}, "'encoder_layers' is 9000000000.0"),
    ({"text_config": {"vision_config": {"num_layers": 10**7}}}, "'text_config.vision_config.num_layers' is 10000000"),
    ({"backbone_config": [{"n_layer": 10**7}]}, "'backbone_config.n_layer' is 10000000"),
]


@pytest.mark.parametrize(("changes", "message"), ABSURD)
def test_absurd_sizes_are_refused_by_name_before_anything_is_built(changes, message, tmp_path, monkeypatch):
    """Layers and labels that fill the memory with Python objects, or take hours."""
    import transformers

    monkeypatch.setattr(transformers, "AutoConfig", None)  # whatever asks for it fails
    with pytest.raises(ValueError, match=message):
        meta_model(written(tmp_path, LLAMA | changes))


def test_sizes_of_real_models_are_not_refused():
    """Llama 4's ten million positions, Switch's 2,048 experts, ImageNet's labels, rope's theta as an integer, and the
    negative indices that some configs have by default."""
    real = {
        "max_position_embeddings": 10_485_760,
        "num_experts": 2048,
        "num_labels": 21_843,
        "rope_theta": 10**10,
        "vision_feature_layer": -2,
        "num_images": -1,
        "pad_token_id": -1,
        "time_step_limit": [0.0, float("inf")],
        "layer_types": ["full_attention"] * 100,
    }
    kept, ignored = checked(LLAMA | real, "m")
    assert (kept, ignored) == (LLAMA | real, [])


def test_what_has_no_name_here_is_stopped_while_it_is_built(tmp_path, monkeypatch):
    """A count under a name that the list does not know."""
    monkeypatch.setattr(bounds, "MOST_MODULES", 20)
    with pytest.raises(bounds.TooLarge, match="has more than 20 modules and weights: look at its counts"):
        meta_model(written(tmp_path, LLAMA))


def fill_memory() -> None:
    """As a table that a model computes as a list. It ends by itself, at ten times what is allowed."""
    made, start = [], time.monotonic()
    while len(made) < 160_000 and time.monotonic() - start < 10:
        made.append(bytearray(4096))
        if len(made) % 100 == 0:
            time.sleep(0.002)


@pytest.mark.parametrize(("which", "most"), [("BYTES", 1 << 26), ("SECONDS", 0.3)])
def test_a_loop_is_stopped(which, most, monkeypatch):
    """What would take gigabytes, or hours, in a loop that registers no module."""
    monkeypatch.setattr(bounds, f"MOST_{which}", most)
    with pytest.raises(bounds.TooLarge, match=f"'x' takes more than {most} {which.lower()}"), bounds.bounded("'x'"):
        fill_memory()


def test_an_alarm_of_the_users_stays():
    signal = pytest.importorskip("signal")
    mine = lambda *given: None  # noqa: E731
    before = signal.signal(signal.SIGALRM, mine)
    try:
        with bounds.bounded("x"):
            assert signal.getsignal(signal.SIGALRM) is mine
        assert signal.getsignal(signal.SIGALRM) is mine
    finally:
        signal.signal(signal.SIGALRM, before)
    with bounds.bounded("x"):
        assert signal.getsignal(signal.SIGALRM) is not before
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: os.mkfifo(path), "is not a file"),
        (lambda path: path.mkdir(), "is not a file|there is no"),
        (lambda path: path.symlink_to(path), "symbolic links|Too many levels|no '"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a file"),
        (lambda path: path.touch() or os.truncate(path, 1 << 30), "has 1073741824 bytes .a config.json has at most"),
        (lambda path: path.write_text('{"a":' * 100_000), "nested too deeply|Expecting"),
        (lambda path: path.write_text('{"model_type":"llama","a":' + "[" * 50 + "]" * 50 + "}"), "more than 20 deep"),
        (lambda path: path.write_text('{"a": ' + "9" * 5000 + "}"), "4300 digits|model_type"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot|can't|can read"),
        (lambda path: path.write_text("[1]"), "it is .1. and not an object"),
        (lambda path: path.write_text("\x1b]0;x\x07"), "Expecting value"),
        (lambda path: path.write_text('{"model_type": "\\u001b[31m"}'), r"no model_type '\\x1b\[31m'"),
    ],
)
def test_files_that_are_no_config(make, message, tmp_path, capsys):
    """A pipe that is waited for, a device without an end, a gigabyte, brackets that end the process."""
    make(tmp_path / "config.json")
    assert main(["memory", "--model", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1, said
    assert said.isascii()
    assert "\x1b" not in said
    assert re.search(message, said), said


NAMES = [
    "num_hidden_layers",
    "num_labels",
    "hidden_size",
    "vocab_size",
    "head_dim",
    "num_experts",
    "layer_types",
    "new",
]
NAMES += ["auto_map", "attn_implementation", "rope_scaling", "rope_theta", "id2label", "pad_token_id", "sub_configs"]
NAMES += ["__class__", "__dict__", "to_dict", "hidden_act", "text_config", "model_type", "architectures"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, -1, 3, 64, 1000, 10**5, 10**8, 10**12, 10**400, "llama", "own.Config", "owner/kernel", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=6,
)
KINDS = st.sampled_from(["llama", "mixtral", "gpt2", "bert", "llava", "swin", "own"])


def one_answer(config: dict) -> None:
    """A model, or one of the two kinds of errors in one line."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = ""
        try:
            meta_model(written(Path(folder), config))
        except (ValueError, OSError) as error:
            text = str(error)
    assert "\n" not in text
    assert "\x1b" not in text
    assert len(text) < 1500


CHANGES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4)
HOSTILE = """
import resource, sys
sys.path[:0] = {path!r}
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
import test_model_config as cases
cases.hypothesis_run(1500)
"""


def hypothesis_run(examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(st.sampled_from(["llama", "mixtral", "gpt2", "bert", "llava", "swin", "own"][: examples // 10]), CHANGES)
    def run(kind: str, changes: dict) -> None:
        one_answer({"model_type": kind, **SMALL, **changes})

    run()


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.full)])
def test_hostile_configs_have_one_answer_each(alone):
    """An exception of another kind, a traceback of several lines, a process that dies or never ends. The few examples
    that run here are the same every time."""
    if not alone:
        hypothesis_run(20)
        return
    code = HOSTILE.format(path=[str(Path(__file__).parent), *sys.path])
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-3000:]


def test_the_pattern_of_what_is_ignored_spares_ordinary_keys():
    ordinary = [
        "attention_dropout",
        "attention_bias",
        "hidden_act",
        "use_cache",
        "num_experts_per_tok",
        "architectures",
    ]
    assert not [key for key in ordinary if model_config._IGNORED.fullmatch(key)]


@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=4))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_is_let_through_has_no_ignored_key(config):
    try:
        kept, _ = checked(config | {"model_type": "x", "inner": [config]}, "m")
    except ValueError:
        return
    assert "auto_map" not in json.dumps(kept)
    assert '"attn_implementation"' not in json.dumps(kept)
