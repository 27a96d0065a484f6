"""Small shared fixtures: tiny models, folders on a real disk, the plain twin with decoded weights."""

import gc
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# peft imports bitsandbytes, which asks for compiled functions: 1.2 s of compilers in every process that none here uses.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from offload_rt._engine import Engine  # noqa: E402
from offload_rt.layers.discover import find_blocks  # noqa: E402
from offload_rt.quantized import codec  # noqa: E402
from offload_rt.tensor_spec import Encoding  # noqa: E402
from offload_rt.wiring.runtime_options import RuntimeOptions  # noqa: E402

torch.set_num_threads(1)
for devices in (torch.cuda, torch.xpu, torch.mtia):
    if not devices.is_available():  # torch notes the caller's stack at every seed, for devices that are not there
        devices.manual_seed_all = lambda seed: None
ANY_TIME = [HealthCheck.too_slow]
SHARES_FIXTURES = [*ANY_TIME, HealthCheck.function_scoped_fixture]
"""Checks to leave out where the examples of a test share what its fixtures made."""
timeless = settings(deadline=None, suppress_health_check=ANY_TIME)  # no test depends on time, or on chance
settings.register_profile("offload_rt", timeless, derandomize=True)
settings.register_profile("random", timeless)  # other examples each time: make test-all
settings.load_profile("offload_rt")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY = 64


def pytest_collection_finish():
    """What was imported stays: a full collection need not look at half a million objects of torch's (0.3 s)."""
    gc.collect()
    gc.freeze()


def _takes_direct_io(folder):
    path = Path(folder) / f"offload_rt-probe-{os.getpid()}"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


@pytest.fixture(scope="session", autouse=True)
def _cache_of_drives(tmp_path_factory):
    """A run of the tests probes each drive once, and leaves the user's cache alone."""
    os.environ["OFFLOAD_RT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def open_descriptors():
    """This process's. What others have left is collected first: the collector may come at any time."""
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def threads():
    """Lets torch compute by so many threads; afterwards by one again."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture
def disk_folder():
    """A folder on a disk that takes O_DIRECT, where there is one; otherwise any (reads then go through the cache)."""
    candidates = [os.environ.get("OFFLOAD_RT_TEST_DISK"), tempfile.gettempdir(), "/var/tmp", os.getcwd()]
    home = next((c for c in candidates if c and os.path.isdir(c) and _takes_direct_io(c)), tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix="offload_rt-test-", dir=home) as folder:
        yield Path(folder)


def flip(path, offset_bytes, mask=1):
    """Flips bits of one byte of a file, as a drive may that forgets; an offset below zero counts from the end."""
    with open(path, "r+b") as file:
        file.seek(offset_bytes, os.SEEK_END if offset_bytes < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ mask]))


@contextmanager
def forked_child():
    """A child of this process that does nothing inside, with every descriptor: as a data loader's workers have them."""
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(wait, 1)
        os._exit(0)
    os.close(wait)
    try:
        yield
    finally:
        os.close(go)
        os.waitpid(child, 0)


class PlainLayer(nn.Module):
    """A residual layer with dropout; its input and output are (batch, seq, width)."""

    def __init__(self, width=32, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, hidden_BTD):
        return hidden_BTD + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(hidden_BTD))))) * (
            self.scale
        )


class PlainModel(nn.Module):
    """Layers in a ModuleList between two linears. In each layer `scale` trains, the rest is frozen."""

    def __init__(self, layers, width=32):
        super().__init__()
        self.enter = nn.Linear(8, width)
        self.layers = nn.ModuleList(layers)
        self.leave = nn.Linear(width, 4)
        self.requires_grad_(False)
        for name, parameter in self.named_parameters():
            if name.endswith("scale"):
                parameter.requires_grad_(True)

    def forward(self, x_BTF):
        hidden_BTD = self.enter(x_BTF)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD)
        return self.leave(hidden_BTD)


def build_plain(layer=PlainLayer, num_layers=4, seed=0, **kwargs):
    torch.manual_seed(seed)
    return PlainModel([layer(**kwargs) for _ in range(num_layers)])


def build_base(family, dtype, num_layers=4, **changes):
    """A tiny causal language model of `family`, random weights."""
    transformers = pytest.importorskip("transformers")
    common = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": num_layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "llama":
        config = transformers.LlamaConfig(**{**common, **changes})
    elif family == "qwen":
        config = transformers.Qwen2Config(**{**common, "tie_word_embeddings": True, **changes})
    elif family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=num_layers, n_head=4, n_positions=64,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes,
        )  # fmt: skip
    elif family == "moe":
        moe = {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
            "head_dim": 16,
        }
        config = transformers.Qwen3MoeConfig(**{**common, **moe, **changes})
    else:
        raise ValueError(family)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


LORA_TARGETS = {
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "moe": ["q_proj", "v_proj"],
}


def build_lora(family="llama", dtype=torch.bfloat16, num_layers=4, dropout=0.1, seed=0, **changes):
    """The same with LoRA on it, whose B is not zero so that every gradient is not."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    base = build_base(family, dtype, num_layers, **changes)
    config = peft.LoraConfig(
        r=4, lora_dropout=dropout, target_modules=LORA_TARGETS.get(family, "all-linear"), task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def decode_in_place(model):
    """Replaces every weight that `bits=4` would quantize by what its NF4 form decodes to: the in-memory twin."""
    for draft in find_blocks(model, bits=4):
        for spec, stored in zip(draft.spec.tensors, draft.parameters, strict=True):
            weight = stored.parameter.data
            if spec.encoding is Encoding.NF4:
                stored.parameter.data = _round_trip(weight)
            elif spec.encoding is Encoding.NF4_TRANSPOSED:
                stored.parameter.data = _round_trip(weight.t()).t().contiguous()
            elif spec.encoding is Encoding.NF4_EXPERTS:
                stored.parameter.data = torch.stack([_round_trip(expert) for expert in weight])
    return model


def _round_trip(weight):
    weight = weight.contiguous()
    return codec.decode(codec.encode(weight), weight.shape, weight.dtype)


def language_batch(seed, rows=2, tokens=12):
    torch.manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens))
    return {"input_ids": ids, "labels": ids}


class EngineMaker:
    """Makes engines and closes them at the end of the test. Their layers stream, in whatever memory, but for
    `fill=True` in their options.
    """

    def __init__(self):
        self.engines = []

    def __call__(self, model, options=None, **arguments):
        defaults = {"batch_size": 2, "seq_len": 16, "lr": 1e-2}
        if "optimizer" in arguments:
            defaults.pop("lr")
        engine = Engine(
            model, options=RuntimeOptions(**{"fill": False, **(options or {})}), **{**defaults, **arguments}
        )
        self.engines.append(engine)
        return engine

    def close(self):
        for engine in self.engines:
            engine.close()


@pytest.fixture
def make_engine():
    maker = EngineMaker()
    yield maker
    maker.close()
