"""Models from the shapes of their tensors: as the families count them, and as transformers creates them."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from offload_rt.cli.main import main
from planners.problems.model_workload import make_workload
from planners.shapes import models
from planners.shapes.architectures import shape_from_config
from planners.shapes.headers import read_headers
from planners.shapes.meta_model import NotThere, parameter_shapes
from planners.shapes.models import find_model, read_config
from planners.shapes.tensors import Hints, shape_from_tensors
from planners.units import ProblemError
from tests.test_planner_models import CASES, GQA, SMALL, created_params

UNKNOWN = {
    "stablelm": GQA,
    "glm4": {**GQA, "head_dim": 12, "pad_token_id": 0},
    "gpt_neox": SMALL,
    "bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": 97},
    "gptj": {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 97, "rotary_dim": 4},
    "olmoe": {**GQA, "num_experts": 8, "num_experts_per_tok": 2},
}  # fmt: skip
"""Families without a function here."""


def write_file(path, tensors, dtype="BF16", data=True):
    """A safetensors file; without its data where only the header matters."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + (bytes(at) if data else b""))


@pytest.fixture(scope="module")
def shapes():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return {case: parameter_shapes({"model_type": case.split()[0], **CASES[case]}) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_shapes_say_what_the_family_says(case, shapes):
    """Two ways to the same counts: by the family's function, and by names and shapes."""
    import transformers

    config = transformers.AutoConfig.for_model(case.split()[0], **CASES[case])
    file = json.loads(config.to_json_string(use_diff=False))
    known = shape_from_config(file, case)
    found = shape_from_tensors(case, shapes[case], models._hints(models.JsonFile(case, json.dumps(file))))
    assert found.params == known.params and found.embedding_params == known.embedding_params
    assert (found.head_params, len(found.layers)) == (known.head_params, len(known.layers))
    for one, other in zip(found.layers, known.layers, strict=True):
        for stage in ("qkv", "output", "router", "up", "down"):
            weights, flops = (
                [sum(getattr(x, what) for x in layer.linears if x.stage == stage) for layer in (one, other)]
                for what in ("weights", "flops_per_token")
            )
            assert weights[0] == weights[1] and flops[0] == flops[1], stage
        assert one.params == other.params and one.mlp_features == other.mlp_features
        assert one.attention.flops_per_token(64) == other.attention.flops_per_token(64) or one.attention.window
    make_workload(found, batch_size=1, seq_len=64)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_family_that_is_not_known_is_taken_from_the_meta_device(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind, **UNKNOWN[kind]}))
    shape = read_config(path)
    assert shape.params == created_params(transformers.AutoConfig.for_model(kind, **UNKNOWN[kind]))
    assert {linear.stage for linear in shape.layers[0].linears} >= {"qkv", "output", "up", "down"}
    if kind == "olmoe":
        assert {(x.count, x.active) for x in shape.layers[0].linears if "experts" in x.name} == {(8, 2)}


def test_headers_are_read_and_no_data(tmp_path, shapes):
    """The file ends with its header; a data read would fail."""
    write_file(tmp_path / "model.safetensors", shapes["llama"], data=False)
    known = shape_from_config({"model_type": "llama", **GQA}, "llama")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        shape = find_model(str(path))
        assert shape.params == known.params and shape.layers[0].mlp_features == known.layers[0].mlp_features


def test_shards_are_read_together_and_a_missing_one_is_named(tmp_path, shapes):
    names = sorted(shapes["llama"])
    for part, own in enumerate((names[::2], names[1::2]), start=1):
        file = tmp_path / f"model-0000{part}-of-00002.safetensors"
        write_file(file, {name: shapes["llama"][name] for name in own}, data=False)
    assert find_model(str(tmp_path)).params == shape_from_config({"model_type": "llama", **GQA}, "llama").params
    with pytest.raises(ProblemError, match="1 of 2 shards; give the folder"):
        find_model(str(tmp_path / "model-00001-of-00002.safetensors"))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ProblemError, match="1 of 2 shards; download the others"):
        find_model(str(tmp_path))


def test_an_unknown_family_with_files_needs_no_transformers(tmp_path, shapes, monkeypatch):
    """Experts per token come from the configuration, all else from the headers."""
    monkeypatch.setattr(models, "parameter_shapes", lambda config: pytest.fail("built a model"))
    write_file(tmp_path / "model.safetensors", shapes["mixtral"], data=False)
    with pytest.raises(ProblemError, match="shapes do not say how many a token meets"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel", "num_experts_per_tok": 3}))
    assert {x.active for x in find_model(str(tmp_path)).layers[0].linears if x.count > 1} == {3}


def test_an_unknown_family_without_transformers_names_the_nearest(tmp_path, monkeypatch):
    def missing(config):
        raise NotThere("torch is not installed")

    monkeypatch.setattr(models, "parameter_shapes", missing)
    (tmp_path / "config.json").write_text('{\n"model_type": "quen2"}')
    with pytest.raises(
        ProblemError, match=r"config.json:2: model_type: unknown 'quen2'; did you mean 'qwen2'\?.*torch is"
    ):
        read_config(tmp_path)


def test_what_transformers_refuses_is_one_line(tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    assert main(["plan", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'llama'" in error and "transformers cannot build it" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a safetensors file"),
        (b"PK\x03\x04 a zip file", "not a safetensors file"),
        (struct.pack("<Q", 100) + b"{}", "truncated: 2 of 100 bytes"),
        (struct.pack("<Q", 2) + b"[]", "expected an object"),
        (struct.pack("<Q", 12) + b'{"a": [1, 2]}', "not JSON"),
        (struct.pack("<Q", 13) + b'{"a": [1, 2]}', "a: expected a dtype and a shape"),
    ],
)
def test_a_broken_file_says_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ProblemError, match=message) as caught:
        find_model(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"a.weight": (2, 2)}, "none of its 1 tensors is in a numbered layer"),
        ({"layers.0.a.weight": (2, 2), "embed.weight": (9, 2)}, "no attention that is known"),
        ({"layers.0.q_proj.weight": (2, 2)}, "no embedding"),
        ({"layers.1.q_proj.weight": (2, 2), "embed.weight": (9, 2)}, "layer layers.0 is missing"),
        ({"layers.0.q_proj.weight.absmax": (2,)}, "packed weights do not say their shapes"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path, tensors, message):
    write_file(tmp_path / "model.safetensors", tensors, dtype="F32", data=False)
    with pytest.raises(ProblemError, match=message):
        find_model(str(tmp_path))


def test_buffers_and_integers_are_no_parameters(tmp_path):
    path = tmp_path / "model.safetensors"
    write_file(path, {"h.0.attn.ids": (4, 4)}, dtype="I64", data=False)
    assert read_headers(path) == {}
    mask = {"h.0.attn.bias": (1, 1, 8, 8), "h.0.attn.rotary_emb.inv_freq": (8,)}
    plain = {"h.0.q_proj.weight": (4, 4), "h.0.o_proj.weight": (4, 4), "wte.weight": (9, 4)}
    assert shape_from_tensors("x", {**mask, **plain}, Hints()).params == 4 * 4 * 2 + 36


def test_planning_from_headers_imports_no_torch(tmp_path, shapes):
    write_file(tmp_path / "model.safetensors", shapes["llama"], data=False)
    root = Path(__file__).resolve().parents[1]
    argv = ["plan", "--model", str(tmp_path), "--no-advice"]
    code = (
        f"import sys\nfrom offload_rt.cli.main import main\nassert main({argv!r}) == 0\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
