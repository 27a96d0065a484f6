"""The command line: what it imports, how it fails, what `doctor` tries, what `clean` leaves alone, a whole run."""

from __future__ import annotations

import fcntl
import gzip
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from offload_rt.cli import doctor_folder, doctor_machine
from offload_rt.cli.main import COMMANDS, main
from offload_rt.cli.model_folder import check_length
from offload_rt.cli.train_run import _adapters
from offload_rt.errors import ConfigError, StorageError
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.rule.filling import Fill
from tests.test_data import make_tokenizer

torch.set_num_threads(1)

SOURCE = Path(__file__).resolve().parent.parent
TRAIN = ["train", "--model", "x", "--data", "y", "--out", "z"]


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE), **environment},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(words)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("offload-rt: error: "), captured.err
    return code, lines[0]


def test_help_version_and_mistakes_import_nothing_heavy(tmp_path: Path) -> None:
    ran = python(
        """
        import sys
        from offload_rt.cli.main import main
        for words in (
            ["--help"], [], ["--version"], ["trian"], ["--vresion"], ["train", "--help"],
            ["train", "--modle", "x"], ["train", "--model", "x"], ["clean", "--nvme", sys.argv[1]],
            ["report", sys.argv[1]],
            ["train", "--model", "x", "--data", "y", "--out", "z", "--device-memory", "3 parsecs"],
            ["train", "--model", "x", "--data", "y", "--out", "z", "--adapters", "lora:rank=3"],
        ):
            try:
                main(words)
            except SystemExit:
                pass
            heavy = {"torch", "transformers", "peft", "numpy", "rich"} & set(sys.modules)
            assert not heavy, (words, heavy)
        """,
        str(tmp_path),
    )
    assert ran.returncode == 0, ran.stderr
    assert "usage: offload-rt COMMAND" in ran.stdout and all(name in ran.stdout for name in COMMANDS)
    assert "--device-memory" in ran.stdout and re.search(r"offload-rt \d+\.\d+", ran.stdout)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["xyz"], "unknown command 'xyz'; allowed: calibrate, clean, doctor, plan, report, train"),
        (["train", "--modle=x"], "unknown option --modle; did you mean '--model'?"),
        (["train", "--mod", "x"], "unknown option --mod; did you mean '--model'?"),
        (["train", "--model", "x"], "required: --data, --out (see offload-rt train --help)"),
        (["doctor", "now"], "unexpected argument 'now'"),
        (["clean", "--nvme", "/nonexistent"], "--nvme: /nonexistent is not a folder"),
        (["train", "--model", "x", "--data", "y", "--out", "z", "--bits", "3"], "--bits: invalid choice: 3"),
        (["train", "--model", "x", "--data", "y", "--out", "z", "--seq-len", "0"], "seq_len: must be"),
        (["train", "--model", "x", "--data", "y", "--out", "z", "--steps", "1", "--epochs", "1"], "one of the two"),
        (["train", "--model", "/nonexistent", "--data", "y", "--out", "/nonexistent"], "is not a folder"),
        ([*TRAIN, "--full", "--bits", "4"], "--full, --bits 4: weights in 4 bits are frozen"),
        ([*TRAIN, "--full", "--adapters", "lora:r=4"], "--full, --adapters: give one of the two"),
        ([*TRAIN, "--adapters", "./here:r=4"], "adapters: ./here goes on with its own configuration; leave out 'r=4'"),
        ([*TRAIN, "--adapters", "lroa:r=4"], "adapters: 'lroa' is no folder, and no kind; did you mean 'lora'?"),
        ([*TRAIN, "--optimizer", "lion"], "--optimizer: is for --full"),
        ([*TRAIN, "--full", "--optimizer", "adam"], "--optimizer: invalid choice: 'adam'"),
        ([*TRAIN, "--full", "--copy-every", "5"], "--copy-every: without --nvme every checkpoint is a copy"),
        ([*TRAIN, "--report-to", "none", "--logdir", "d"], "--report-to none, --logdir: give one of the two"),
        ([*TRAIN, "--trace-steps", "2"], "--trace-steps: is for --trace, which is not given"),
        ([*TRAIN, "--trace", "t", "--trace-steps", "0"], "--trace-steps: must be at least 1, got 0"),
        ([*TRAIN, "--trace", "/nonexistent/t.json"], "trace: /nonexistent/t.json cannot be written: No such file"),
        ([*TRAIN, "--keep-best"], "--keep-best: is for --eval-data, which is not given"),
        ([*TRAIN, "--tbw", "600 miles"], "tbw: unknown unit 'miles' in '600 miles'; allowed: b, gb,"),
        ([*TRAIN, "--seed", str(2**70)], "--seed: must have at most 64 bits"),
        ([*TRAIN, "--out", ""], "--out: the name of the folder is empty"),
        ([*TRAIN, "--model", ""], "--model: the name of the folder is empty"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = fails(capsys, *words)
    assert code == 2 and message in line


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        ("wandb", ["--report-to", "wandb"], "wandb: is not installed"),
        ("torch.utils.tensorboard.writer", ["--logdir", "d"], "logdir: needs TensorBoard"),
    ],
)
def test_what_is_reported_to_is_looked_for_before_the_model_is(
    module: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, line = fails(capsys, *TRAIN, *words)
    assert code == 2 and message in line


def test_the_worlds_failure_is_exit_code_1_and_the_traceback_is_there_when_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(arguments: Any) -> int:
        raise StorageError("cannot be read", path="/drive/weights.bin", offset=4096, wanted=10, done=2, errno=5)

    monkeypatch.setattr("offload_rt.cli.doctor.run", broken)
    code, line = fails(capsys, "doctor")
    assert code == 1 and "/drive/weights.bin: cannot be read (2 of 10 bytes at offset 4096) (errno 5, EIO)" in line
    monkeypatch.setenv("OFFLOAD_RT_TRACEBACK", "1")
    with pytest.raises(StorageError):
        main(["doctor"])


def test_doctor_reports_every_path_and_probes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--nvme", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for name in ("system", "packages", "cpu", "memory", "ulimit -l", "gpu", "torch", "native core", "io_uring",
                 "files by", "NF4 by", "GDS", "folder"):  # fmt: skip
        assert re.search(rf"^{name}: +\S", shown, re.MULTILINE), name
    assert re.search(r"1 MiB written, read back and equal", shown) and "GB/s" in shown
    assert "nothing:" not in shown
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_where_others_keep_the_cores_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})  # which says nothing of the load
    for average, said in ((3.9, False), (4.0, True)):
        monkeypatch.setattr(os, "getloadavg", lambda average=average: (average, 0.0, 0.0))
        text = doctor_machine.load(4)
        assert text.startswith(f"{average} on 4 cores") and ("try OMP_NUM_THREADS=2" in text) == said
    for num_threads in (1, None):
        assert "others compute too" in (text := doctor_machine.load(num_threads)) and "OMP" not in text


def test_doctor_works_without_native_core_transformers_and_even_torch(tmp_path: Path) -> None:
    code = """
        import sys
        for name in sys.argv[2:]:
            sys.modules[name] = None
        from offload_rt.cli.main import main
        sys.exit(main(["doctor"] + sys.argv[1].split()))
    """
    brief = python(code, "--brief", "transformers", "peft", "pynvml", OFFLOAD_RT_NATIVE="0")
    assert brief.returncode == 0, brief.stderr
    first, second = brief.stdout.splitlines()
    assert "NF4 by torch" in first and "files by aiofiles" in first
    assert "native core not in use (switched off by OFFLOAD_RT_NATIVE=0)" in second
    full = python(code, "", "torch", "pynvml", "_offload_rt_native")
    assert full.returncode == 0, full.stderr
    assert "torch:       cannot be imported" in full.stdout and "gpu:         none seen" in full.stdout


def test_a_folder_that_is_missing_or_in_memory_is_named(tmp_path: Path) -> None:
    assert doctor_folder.folder_lines(tmp_path / "missing") == [f"{tmp_path / 'missing'}: is not a folder"]
    if doctor_folder.file_system_of(Path("/dev/shm"))[0] == "tmpfs":
        assert any("in memory, not on a drive" in line for line in doctor_folder.folder_lines(Path("/dev/shm")))
    assert doctor_folder.file_system_of(Path("/proc/self"))[0] == "proc"


def make_store(folder: Path, key: str, *, marker: bool = True, lock: bool = True) -> Path:
    store = folder / f"offload_rt-{key}"
    store.mkdir()
    (store / "manifest.json").write_text("{}")
    (store / "weights.bin").write_bytes(b"x" * 8192)
    if lock:
        (store / "lock").write_text("pid 1 on here\n")
    if marker:
        (store / "OFFLOAD_RT_STORE").write_text("")
    return store


def test_clean_removes_unused_stores_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unused = make_store(tmp_path, "0" * 16)
    used = make_store(tmp_path, "1" * 16)
    committed = make_store(tmp_path, "2" * 16)
    (committed / "commit").mkdir()
    trains = make_store(tmp_path, "5" * 16)
    (trains / "state.bin").write_bytes(b"x" * 4096)
    others = [
        make_store(tmp_path, "3" * 16, marker=False),
        make_store(tmp_path, "4" * 16, lock=False),
        make_store(tmp_path, "too-short"),
    ]
    elsewhere = make_store(tmp_path, "not-ours")
    link = tmp_path / f"offload_rt-{'6' * 16}"
    link.symlink_to(elsewhere)
    (unused / "outside").symlink_to(used / "weights.bin")
    with open(used / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(["clean", "--nvme", str(tmp_path)]) == 0
        listed = capsys.readouterr().out
        assert f"{unused}  unused" in listed and "nothing was removed" in listed and unused.exists()
        assert f"{used}  stays: in use (pid 1 on here)" in listed
        assert f"{committed}  stays: it holds the training state" in listed
        assert f"{trains}  stays: it holds the training state" in listed
        assert f"{others[1]}  stays: it has no lock file" in listed
        assert len(listed.splitlines()) == 6
        assert main(["clean", "--nvme", str(tmp_path), "--yes"]) == 0
        assert "removed 1 of 5, " in capsys.readouterr().out
    assert not unused.exists() and link.is_symlink()
    assert all((store / "weights.bin").stat().st_size == 8192 for store in [used, committed, elsewhere, *others])
    assert main(["clean", "--nvme", str(tmp_path), "--yes"]) == 0
    assert not used.exists() and committed.exists() and trains.exists()
    assert main(["clean", "--nvme", str(tmp_path), "--state", "--yes"]) == 0
    assert not committed.exists() and not trains.exists()


def save_llama(folder: Path, *, vocabulary: int, width: int, layers: int, heads: int) -> Path:
    """Writes a Llama with random weights and the letters' tokenizer to `folder`, as Hugging Face does."""
    from transformers import LlamaConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), vocabulary=64, width=64, layers=6, heads=4)


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path) -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 8))) for _ in range(40)]
    lines = [json.dumps({"prompt": word, "completion": word[::-1]}) + "\n" for word in words]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    (tmp_path / "nvme").mkdir()
    return [
        "train", "--model", str(model_folder), "--data", str(tmp_path / "data.jsonl"), "--bits", "4",
        "--adapters", "lora:r=4", "--device-memory", "50MiB", "--host-memory", "50MiB",
        "--nvme", str(tmp_path / "nvme"), "--seq-len", "32", "--batch-size", "2", "--accumulation-steps", "2",
        "--schedule", "constant", "--lr", "0.01", "--device", "cpu",
    ]  # fmt: skip


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def test_bitsandbytes_says_nothing_less_than_errors_to_who_trains_adapters() -> None:
    above, below = logging.getLogger("bitsandbytes"), logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = above.level
    try:
        above.setLevel(logging.NOTSET)
        assert below.isEnabledFor(logging.WARNING)
        _adapters("lora:r=8")
        assert not below.isEnabledFor(logging.WARNING) and below.isEnabledFor(logging.ERROR)
    finally:
        above.setLevel(before)


def test_an_output_on_a_full_drive_is_one_line_of_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["--help"]) == 1
        full.flush()  # what waited to be written goes nowhere
    assert capsys.readouterr().err == "offload-rt: error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("packing", [pytest.param([], marks=pytest.mark.full), ["--packing"]])
def test_train_leaves_an_adapter_and_a_resumed_run_leaves_the_same_one(
    arguments: list[str],
    packing: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RuntimeOptions, "fills", Fill.NOTHING)  # any budget for so small a model would hold its layers
    straight, out = tmp_path / "straight", tmp_path / "out"
    arguments += packing
    trace = ["--trace", str(straight / "trace.json.gz"), "--trace-steps"]  # in a folder that the run makes
    code, line = fails(capsys, *arguments, "--out", str(straight), "--steps", "4", *trace, "5")
    assert code == 2 and "--trace-steps: 5 are to be traced, the run has 4" in line and not straight.exists()
    assert main([*arguments, "--out", str(straight), "--steps", "4", *trace, "2"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^step (\d): .* busy: compute \d+%", shown, re.M) == ["3", "4"]
    assert "longest waits: " in shown and gzip.decompress((straight / "trace.json.gz").read_bytes())
    assert "40 examples" in shown and "NF4" in shown and "finished at step 4" in shown
    assert {path.name for path in (straight / "adapter").iterdir()} >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json",
    }  # fmt: skip
    metrics = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert all(line["bytes_read"] > 0 for line in metrics)  # the weights came from the drive in every step

    assert main([*arguments, "--out", str(out), "--steps", "2"]) == 0
    capsys.readouterr()
    code, line = fails(capsys, *arguments, "--out", str(out), "--steps", "4")
    assert code == 2 and "finished at step 2" in line
    code, line = fails(capsys, *arguments, "--out", str(out), "--steps", "4", "--resume", "--lr", "0.02")
    assert code == 2 and "lr was 0.01, is 0.02" in line
    assert main([*arguments, "--out", str(out), "--steps", "4", "--resume", "--trace", str(tmp_path / "t.json")]) == 0
    shown = capsys.readouterr().out
    assert "resuming from checkpoint-2" in shown and "step 4: " in shown, "the last of those that are left is traced"
    assert adapter_bytes(out) == adapter_bytes(straight)
    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "finished at step 4; checkpoints at 2, 4" in shown
    assert "plan:" in shown and "memory:" in shown and "read," in shown


@pytest.mark.full
def test_an_adapter_in_a_folder_goes_on_training_in_a_run_of_its_own(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, straight, out = tmp_path / "first", tmp_path / "straight", tmp_path / "out"
    assert main([*arguments, "--out", str(first), "--steps", "2"]) == 0
    arguments[arguments.index("lora:r=4")] = str(first / "adapter")
    assert main([*arguments, "--out", str(straight), "--steps", "2"]) == 0
    assert f"adapters: go on from {first / 'adapter'} (LORA, as configured there)" in capsys.readouterr().out
    losses = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"] for run in (first, straight)]
    assert losses[0] != losses[1]  # of the same batch, by the base model and by the adapter
    configs = [json.loads((run / "adapter" / "adapter_config.json").read_text()) for run in (first, straight)]
    targets = [sorted(config.pop("target_modules")) for config in configs]  # of a set
    assert configs[0] == configs[1] and configs[0]["r"] == 4 and targets[0] == targets[1]

    assert main([*arguments, "--out", str(out), "--steps", "1"]) == 0
    moved = (first / "adapter").rename(tmp_path / "moved")
    arguments[arguments.index(str(first / "adapter"))] = str(moved)
    assert main([*arguments, "--out", str(out), "--steps", "2", "--resume"]) == 0
    assert adapter_bytes(out) == adapter_bytes(straight)
    capsys.readouterr()
    arguments[arguments.index(str(moved))] = str(straight / "adapter")
    code, line = fails(capsys, *arguments, "--out", str(out), "--steps", "3", "--resume")
    assert code == 2 and f"is '{straight / 'adapter'}'" in line


def test_a_terminated_train_says_how_to_go_on_and_exits_with_the_signals_code(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload_rt._engine import Engine

    take_step = Engine.train_batch

    def step_then_signal(engine: Engine, batches: Any) -> float:
        loss = take_step(engine, batches)
        if engine.report()["step"] == 2:
            signal.raise_signal(signal.SIGTERM)  # to this thread, now
        return loss

    monkeypatch.setattr(Engine, "train_batch", step_then_signal)
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out), "--epochs", "1"]) == 128 + signal.SIGTERM
    assert f"SIGTERM: stopped after step 2 of 10, saved in {out / 'checkpoint-2'}" in capsys.readouterr().out
    assert not (out / "adapter").exists()


def test_bad_data_or_model_is_found_before_a_store_is_written(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["--out", str(tmp_path / "out")]
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n')
    code, line = fails(capsys, *arguments)
    assert code == 2 and "data.jsonl:1: has no 'completion'" in line
    code, line = fails(capsys, *arguments, "--device", "gpu")  # before the data, which may take long
    assert code == 2 and "device: 'gpu' is not offered" in line
    broken = tmp_path / "model"
    broken.mkdir()
    code, line = fails(capsys, *arguments, "--model", str(broken))
    assert code == 2 and "has no config.json" in line
    (broken / "config.json").write_text("{}")
    code, line = fails(capsys, *arguments, "--model", str(broken))
    assert code == 2 and str(broken) in line
    (broken / "config.json").write_text('{"model_type": "t5"}')
    code, line = fails(capsys, *arguments, "--model", str(broken))
    assert code == 2 and f"{broken} has no tokenizer (tokenizer.json, " in line
    (broken / "tokenizer.json").write_text("{")
    code, line = fails(capsys, *arguments, "--model", str(broken))
    assert code == 2 and f"{broken}: its tokenizer cannot be loaded: " in line
    (broken / "tokenizer.json").unlink()
    transformers.ByT5Tokenizer().save_pretrained(broken)  # its words are bytes: no file of a vocabulary
    code, line = fails(capsys, *arguments, "--model", str(broken))
    assert code == 2 and f"{broken}: Unrecognized configuration class" in line
    make_tokenizer().save_pretrained(broken)
    code, line = fails(capsys, *arguments, "--model", str(broken))
    assert code == 2 and f"{broken}: Unrecognized configuration class" in line and "Gemma" not in line
    settings = json.loads((Path(arguments[2]) / "config.json").read_text())
    for wrong in ({"num_attention_heads": 0}, {"dtype": "bflot16"}, {"hidden_act": "siluu"}):
        (broken / "config.json").write_text(json.dumps({**settings, **wrong}))
        code, line = fails(capsys, *arguments, "--model", str(broken))
        assert code == 2 and f"--model: {broken}: its config.json is wrong (" in line
    (tmp_path / "file").write_text("")
    code, line = fails(capsys, *arguments, "--out", str(tmp_path / "file" / "out"))
    assert code == 2 and "file is a file, not a folder" in line
    assert list((tmp_path / "nvme").iterdir()) == [] and not (tmp_path / "out").exists()


def test_rows_longer_than_the_model_was_made_for_are_refused_or_warned_of_once(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n')
    arguments += ["--out", str(tmp_path / "out")]
    for num_tokens, num_warnings in ((2048, 0), (2049, 1)):
        assert main([*arguments, "--seq-len", str(num_tokens)]) == 2
        out = capsys.readouterr().out
        assert out.count("2049 tokens a row, the model was made for 2048") == out.count("warning") == num_warnings


@pytest.mark.parametrize("config", ["GPT2Config", "OPTConfig", "GPTNeoXConfig"])
def test_positions_that_are_learned_end(config: str) -> None:
    import transformers

    made = getattr(transformers, config)(
        max_position_embeddings=24, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=24
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made)
    assert check_length(model, 24) == ""
    if config == "GPTNeoXConfig":  # a vocabulary is no table of positions
        assert "25 tokens a row, the model was made for 24" in check_length(model, 25)
    else:
        with pytest.raises(ConfigError, match=r"the model has learned 24 positions \((transformer\.wpe|model\..*pos)"):
            check_length(model, 25)


@pytest.mark.parametrize(("number", "said"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "aborted")])
def test_a_signal_outside_the_loop_unwinds_the_command_and_is_its_exit_code(
    number: signal.Signals, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of encoding a model, say. The first process of a container has no other answer to SIGTERM."""
    from offload_rt.cli import doctor

    closed = []

    def run(arguments: Any) -> int:
        try:
            signal.raise_signal(number)
        finally:
            closed.append(True)
        return 0

    monkeypatch.setattr(doctor, "run", run)
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert main(["doctor"]) == 128 + number
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert closed == [True] and capsys.readouterr().err == f"offload-rt: {said}\n"


def test_a_forked_child_of_a_command_is_not_unwound_where_it_is_terminated(monkeypatch: pytest.MonkeyPatch) -> None:
    from offload_rt.cli import doctor

    def run(arguments: Any) -> int:
        child = os.fork()
        if child == 0:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    monkeypatch.setattr(doctor, "run", run)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert main(["doctor"]) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
