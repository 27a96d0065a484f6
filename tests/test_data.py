"""JSON lines to batches: what is learned, what is refused, in which order, and packing without mixing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from offload_rt.errors import ConfigError, DataError
from offload_rt.training.batches import Batches, check_packing, packed_batch, padded_batch
from offload_rt.training.data import IGNORED_LABEL, Example, load_examples
from offload_rt.training.data_files import data_files

torch.set_num_threads(1)

WORDS = ["<pad>", "<end>", "<user>", "<assistant>", "<system>", *"abcdefghijklmnopqrstuvwxyz"]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Like Qwen3's: what an earlier assistant turn says is rendered otherwise once another turn follows.
REWRITING_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>"
    "{{ message.content if loop.last or message.role == 'user' else 'z' }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a letter, one a tag; unknown characters are an error of the test."""
    core = Tokenizer(WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = Split("", "isolated")
    core.add_special_tokens(WORDS[:5])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def chat(*contents: str) -> dict[str, Any]:
    roles = ["user", "assistant"]
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]}


def shown(tokenizer: Any, example: Example) -> tuple[str, str]:
    """The whole text, and the same with a dot for each token that is not learned."""
    words = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    learned = [word if label != IGNORED_LABEL else "." for word, label in zip(words, example.labels, strict=True)]
    return "".join(words), "".join(learned)


def test_every_assistant_turn_and_nothing_else_is_learned(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", chat("ab", "c", "d", "ef"))
    [example], report = load_examples(path, tokenizer, seq_len=64)
    whole, learned = shown(tokenizer, example)
    assert whole == "<user>ab<end><assistant>c<end><user>d<end><assistant>ef<end>"
    assert learned == ".....c<end>....ef<end>"
    assert (report.num_tokens, report.num_learned_tokens, report.longest) == (14, 5, 14)
    assert "truncated" not in str(report)


def test_a_system_message_and_a_completion_of_messages_are_not_learned(tokenizer: Any, tmp_path: Path) -> None:
    before = [{"role": "system", "content": "s"}, *chat("a", "b")["messages"], {"role": "user", "content": "c"}]
    record = {"prompt": before, "completion": [{"role": "assistant", "content": "d"}]}
    [example], _ = load_examples(write(tmp_path / "d.jsonl", record), tokenizer, seq_len=64)
    assert shown(tokenizer, example)[1] == "." * 13 + "d<end>"


def test_a_turn_of_weight_zero_is_not_learned(tokenizer: Any, tmp_path: Path) -> None:
    record = chat("a", "b", "c", "d")
    record["messages"][1]["weight"], record["messages"][3]["weight"] = 0, None
    path = write(tmp_path / "d.jsonl", record)
    [example], _ = load_examples(path, tokenizer, seq_len=64)
    assert shown(tokenizer, example)[1] == "." * 10 + "d<end>"
    record["messages"][3]["weight"] = 0
    with pytest.raises(DataError, match="no assistant message to learn"):
        load_examples(write(path, record), tokenizer, seq_len=64)


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "x"}}]}
# Renders descriptions of tools and calls; answers of tools have no place.
CALLING_TEMPLATE = (
    "{% if tools %}<system>{{ tools[0].name }}<end>{% endif %}{% for message in messages %}"
    "{% if message.role != 'tool' %}<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{% endfor %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_what_a_template_has_no_place_for_is_an_error_and_not_left_out(tokenizer: Any, tmp_path: Path) -> None:
    """Else a call is learned as silence, and an answer without what it answers."""
    [question], calling, path = chat("a")["messages"], make_tokenizer(CALLING_TEMPLATE), tmp_path / "d.jsonl"
    called, tools = {"messages": [question, CALL]}, [{"name": "t"}]
    with pytest.raises(DataError, match=r"d\.jsonl:2: the chat template leaves out 'tool_calls' of message 2:"):
        load_examples(write(path, chat("a", "b"), called), tokenizer, seq_len=64)
    with pytest.raises(DataError, match=r":1: the chat template leaves out 'tools':"):
        load_examples(write(path, {**chat("a", "b"), "tools": tools}), tokenizer, seq_len=64)
    [example], _ = load_examples(write(path, {**called, "tools": tools}), calling, seq_len=64)
    assert shown(tokenizer, example) == ("<system>t<end><user>a<end><assistant>x<end>", "......." + "x<end>")
    answered = [question, CALL, {"role": "tool", "content": "z"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r":1: the chat template leaves out the text of message 3 \('tool'\):"):
        load_examples(write(path, {"messages": answered}), calling, seq_len=64)
    answered[2]["content"] = "a"  # which the question says too
    with pytest.raises(DataError, match=r":1: the chat template leaves out the text of message 3 "):
        load_examples(write(path, {"messages": answered}), calling, seq_len=64)
    with pytest.raises(DataError, match=r":1: the chat template leaves out 'tool_calls' of message 2:"):
        unsaid = {"messages": [question, {**CALL, "content": None}]}  # a call as it is usually written
        load_examples(write(path, unsaid), tokenizer, seq_len=64)


def test_what_is_said_beside_a_call_is_an_error_where_a_template_leaves_it_out_of_a_turn_to_learn(
    tmp_path: Path,
) -> None:
    """As Llama 3.1's does; what templates drop from earlier turns, as thoughts, they drop on purpose."""
    calling, path = make_tokenizer(CALLING_TEMPLATE.replace("{{ message.content }}", SAID)), tmp_path / "d.jsonl"
    asked = [chat("a")["messages"][0], {**CALL, "content": "b"}]
    with pytest.raises(DataError, match=r":1: the chat template leaves out the text of message 2 \('assistant'\):"):
        load_examples(write(path, {"messages": asked}), calling, seq_len=64)
    earlier = {"prompt": [*asked, *chat("c")["messages"]], "completion": [{"role": "assistant", "content": "d"}]}
    [example], _ = load_examples(write(path, earlier), calling, seq_len=64)
    assert shown(calling, example)[0] == "<user>a<end><assistant>x<end><user>c<end><assistant>d<end>"


SAID = "{% if not message.tool_calls %}{{ message.content }}{% endif %}"
CUTTING_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<system>s<end>{% endif %}{% for message in messages %}"
    "{% if message.content %}<{{ message.role }}>{{ message.content.split('t')[-1] | trim }}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("system", ["s", "", None])
def test_a_template_may_cut_trim_and_begin_by_itself(system: str | None, tmp_path: Path) -> None:
    """A system message that the template has by itself, one that says nothing, and thoughts (until "t")."""
    cutting = make_tokenizer(CUTTING_TEMPLATE)
    record = chat("a", "zt", "  b ", "c")
    if system is not None:
        record["messages"].insert(0, {"role": "system", "content": system})
    [example], _ = load_examples(write(tmp_path / "d.jsonl", record), cutting, seq_len=64)
    begin = "" if system == "" else "<system>s<end>"
    assert shown(cutting, example)[0] == f"{begin}<user>a<end><assistant><end><user>b<end><assistant>c<end>"


def test_prompt_and_completion_go_through_the_template_or_raw(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "ab", "completion": "cd"})
    [templated], _ = load_examples(path, tokenizer, seq_len=64)
    assert shown(tokenizer, templated) == ("<user>ab<end><assistant>cd<end>", ".....cd<end>")
    [raw], _ = load_examples(path, tokenizer, seq_len=64, prompts="raw")
    assert shown(tokenizer, raw) == ("abcd<end>", "..cd<end>")
    [bare], _ = load_examples(path, make_tokenizer(None), seq_len=64)
    assert shown(tokenizer, bare) == ("abcd<end>", "..cd<end>")


def test_text_is_learned_whole_and_ends(tokenizer: Any, tmp_path: Path) -> None:
    [example], _ = load_examples(write(tmp_path / "d.jsonl", {"text": "abc", "id": 7}), tokenizer, seq_len=64)
    assert shown(tokenizer, example) == ("abc<end>", "abc<end>")


def test_a_token_that_reaches_over_the_prompts_end_is_learned_and_counted(tmp_path: Path) -> None:
    vocabulary = {"<end>": 0, "a": 1, "b": 2, "c": 3, "bc": 4}
    core = Tokenizer(BPE(vocabulary, [("b", "c")]))
    merging = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    path = write(tmp_path / "d.jsonl", {"prompt": "ab", "completion": "ca"})
    [example], report = load_examples(path, merging, seq_len=8)
    assert example.input_ids.tolist() == [1, 4, 1, 0]
    assert example.labels.tolist() == [IGNORED_LABEL, 4, 1, 0]
    assert report.num_merged == 1 and "1 prompts end inside a token" in str(report)


def test_a_template_that_rewrites_earlier_turns_is_an_error_with_its_line(tmp_path: Path) -> None:
    rewriting = make_tokenizer(REWRITING_TEMPLATE)
    single = chat("a", "b")
    [example], _ = load_examples(write(tmp_path / "one.jsonl", single), rewriting, seq_len=64)
    assert shown(rewriting, example)[1] == "....b<end>"
    with pytest.raises(DataError, match=r"two\.jsonl:2: the chat template renders the messages up to number 2"):
        load_examples(write(tmp_path / "two.jsonl", single, chat("a", "b", "c", "d")), rewriting, seq_len=64)


GOOD = {"text": "a b"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"text": "a"', "not JSON"),
        ('[{"text": "a"}]', "expected an object, got list; one JSON object a line is expected, not one array"),
        ("[", "not one array"),
        ("{", "not one over several"),
        ("3", "expected an object, got int"),
        ("[" * 100000, "cannot be read (maximum recursion depth"),
        ('{"text": ' + 5000 * "9" + "}", "cannot be read (Exceeds the limit"),
        (r'{"messages": [{"role": "user", "content": "\ud83d\uDC4d \ud83d"}]}', "half of a surrogate pair"),
        ({"content": "a"}, "it has 'content'"),
        ({"text": "a", "messages": []}, "messages as well as text"),
        ({"text": 3}, "'text' is int"),
        ({"text": ""}, "'text' is empty"),
        ({"prompt": "a"}, "has no 'completion'"),
        ({"prompt": "a", "completion": None}, "'completion' is NoneType"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "'prompt' is str"),
        ({"messages": []}, "an empty list"),
        ({"messages": "a"}, "'messages' is str"),
        ({"messages": ["a"]}, "message 1 of 'messages' is str"),
        ({"messages": [{"content": "a"}]}, "message 1 of 'messages' has no 'role'"),
        ({"messages": [{"role": "user"}]}, "message 1 of 'messages' has no text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant message"),
        ({"messages": [{"role": "user", "content": "a", "weight": 2}]}, "message 1 of 'messages' has a 'weight' of 2"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "begins with an assistant"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tokenizer: Any, tmp_path: Path, bad: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", GOOD, "", bad, GOOD)
    with pytest.raises(DataError) as caught:
        load_examples(path, tokenizer, seq_len=64)
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)


def test_files_that_hold_nothing_are_errors(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the file is empty"):
        load_examples(write(tmp_path / "empty.jsonl", "", "  "), tokenizer, seq_len=64)
    with pytest.raises(DataError, match="No such file"):
        load_examples(tmp_path / "missing.jsonl", tokenizer, seq_len=64)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not UTF-8"):
        load_examples(tmp_path / "latin.jsonl", tokenizer, seq_len=64)
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(DataError, match=r"packed\.jsonl: is compressed by gzip"):
        load_examples(tmp_path / "packed.jsonl", tokenizer, seq_len=64)
    with pytest.raises(DataError, match="no chat template"):
        load_examples(write(tmp_path / "chat.jsonl", chat("a", "b")), make_tokenizer(None), seq_len=64)
    raising = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r":1: the chat template refuses it: roles must alternate"):
        load_examples(tmp_path / "chat.jsonl", raising, seq_len=64)
    with pytest.raises(ConfigError, match="did you mean 'truncate'"):
        load_examples(tmp_path / "chat.jsonl", tokenizer, seq_len=64, too_long="truncated")


def test_truncation_is_counted_and_a_line_with_nothing_left_is_dropped_by_number(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "d.jsonl", chat("a", "bcdef"), chat("abcdefg", "h"), chat("a", "b"))
    examples, report = load_examples(path, tokenizer, seq_len=6)
    assert [shown(tokenizer, example)[1] for example in examples] == ["....bc", "....b<end>"]
    assert (report.num_truncated, report.num_cut_tokens, report.dropped_lines) == (2, 10, (f"{path.name}:2",))
    assert "2 truncated (10 tokens cut); 1 dropped, nothing to learn was left (d.jsonl:2)" in str(report)
    with pytest.raises(DataError, match=r"d\.jsonl:1: 10 tokens, more than seq_len=6"):
        load_examples(path, tokenizer, seq_len=6, too_long="error")
    with pytest.raises(DataError, match="nothing left to learn in any of 3 lines after truncation to seq_len=4"):
        load_examples(path, tokenizer, seq_len=4)


def test_files_and_folders_of_them_are_read_one_behind_the_other(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    last = write(tmp_path / "last.jsonl", {"text": "d"}, chat("abcdefg", "h"))
    write(folder / "b.jsonl", {"text": "b"})
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n\n{"text": "aa"}\n'))
    (folder / "notes.md").write_text("no lines of JSON")
    files = data_files([folder, last, folder / "b.jsonl"])
    assert files == [folder / "a.jsonl.gz", folder / "b.jsonl", last, folder / "b.jsonl"]
    examples, report = load_examples(files, tokenizer, seq_len=6)
    texts = [shown(tokenizer, example)[0] for example in examples]
    assert texts == [f"{text}<end>" for text in ("a", "aa", "b", "d", "b")]
    assert report.num_examples == 5 and report.dropped_lines == ("last.jsonl:2",)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: a folder without files that end in \.jsonl"):
        data_files([last, tmp_path / "empty"])
    with pytest.raises(DataError, match="none: cannot be read"):
        data_files([last, tmp_path / "none"])
    with pytest.raises(DataError, match="the name of a file is empty"):  # not all files of the current folder
        data_files([str(last), ""])
    (folder / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"b\.jsonl: no examples: the file is empty"):
        load_examples(files, tokenizer, seq_len=6)


@pytest.mark.parametrize(
    ("cut", "words"),
    [(lambda whole: whole[:-12], "behind line [0-9]+"), (lambda whole: b"{}" + whole, "behind line 0 .*gzipped")],
)
def test_a_compressed_file_that_is_cut_or_none_is_an_error(
    cut: Callable[[bytes], bytes], words: str, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(cut(gzip.compress(b'{"text": "a"}\n' * 9)))
    with pytest.raises(DataError, match=rf"a\.jsonl\.gz: cannot be read {words}"):
        load_examples(path, tokenizer, seq_len=64)


def lengths(*sizes: int) -> list[Example]:
    return [
        Example(np.full(size, at + 1, np.int32), np.full(size, at + 1, np.int32), at + 1)
        for at, size in enumerate(sizes)
    ]


MANY = lengths(*(3 + at * 7 % 20 for at in range(50)))


@pytest.mark.parametrize("packing", [False, True])
def test_every_example_comes_once_an_epoch_in_a_seeded_order(packing: bool) -> None:
    def epochs(seed: int) -> list[list[int]]:
        batches = Batches(MANY, batch_size=4, seq_len=32, seed=seed, packing=packing)
        seen = []
        for epoch in range(2):
            rows = [next(batches)["input_ids"] for _ in range(batches.num_batches(epoch))]
            order = [int(token) for ids in rows for row in ids for token in row.unique_consecutive() if token]
            assert sorted(order) == list(range(1, 51))
            seen.append(order)
        return seen

    assert epochs(0) == epochs(0)
    assert epochs(0) != epochs(1) and epochs(0)[0] != epochs(0)[1]


def test_batches_of_similar_length_cut_padding_and_the_largest_comes_first() -> None:
    batches = Batches(MANY, batch_size=4, seq_len=32, pad_to_multiple_of=1)
    masks = [next(batches)["attention_mask"] for _ in range(batches.num_batches(0))]
    assert sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks) > 0.9
    assert masks[0].numel() == max(mask.numel() for mask in masks)


@pytest.mark.parametrize("packing", [False, True])
def test_a_restored_iterator_continues_exactly_even_across_epochs(packing: bool) -> None:
    def made(seed: int = 3) -> Batches:
        return Batches(MANY, batch_size=4, seq_len=32, seed=seed, packing=packing)

    straight = made()
    taken = [next(straight) for _ in range(20)]
    for stop in (1, straight.num_batches(0), 17):
        first, second = made(), made()
        for _ in range(stop):
            next(first)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for expected in taken[stop:]:
            assert torch.equal(next(second)["input_ids"], expected["input_ids"])
    with pytest.raises(DataError, match="seed was 4, is 3"):
        made().load_state_dict(made(seed=4).state_dict())
    other = Batches(MANY[1:], batch_size=4, seq_len=32, seed=3, packing=packing)
    with pytest.raises(DataError, match="examples was 50, is 49"):
        other.load_state_dict(straight.state_dict())


def test_rows_have_few_widths_and_none_beyond_seq_len() -> None:
    batches = Batches(MANY, batch_size=1, seq_len=22)
    widths = {next(batches)["input_ids"].shape[1] for _ in MANY}
    assert widths == {8, 16, 22}
    with pytest.raises(ConfigError, match="pad_to_multiple_of"):
        Batches(MANY, batch_size=1, seq_len=22, pad_to_multiple_of=0)


def test_padding_is_on_the_right_and_not_learned() -> None:
    batch = padded_batch(lengths(2, 4), pad_token_id=9, width=4)
    assert batch["input_ids"].tolist() == [[1, 1, 9, 9], [2, 2, 2, 2]]
    assert batch["labels"].tolist() == [[1, 1, -100, -100], [2, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_packing_fills_rows_and_never_learns_across_a_border() -> None:
    batch = packed_batch([lengths(2, 3), lengths(4)], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 1, 2, 2, 2], [1, 1, 1, 1, 9]]
    assert batch["labels"].tolist() == [[-100, 1, -100, 2, 2], [-100, 1, 1, 1, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert "attention_mask" not in batch and batch["use_cache"] is False
    batches = Batches(MANY, batch_size=2, seq_len=32, packing=True)
    rows = [next(batches)["input_ids"] for _ in range(batches.num_batches(0))]
    assert all(row.shape[1] <= 32 for row in rows)
    assert sum(map(len, MANY)) / (32 * sum(len(row) for row in rows)) > 0.85


SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_logits_equal_those_of_each_example_alone(name: str, attention: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)
    model.train()  # dropout is 0 in these; training is the mode that packs
    if name == "gpt2":
        model.eval()
    rng = np.random.default_rng(0)
    documents = [Example(ids, ids, 0) for size in (5, 1, 9, 3) for ids in [rng.integers(1, 64, size).astype(np.int32)]]
    rows = [documents[:3], documents[3:]]
    batch = packed_batch(rows, pad_token_id=0)
    batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch).logits
        for at, row in enumerate(rows):
            start = 0
            for document in row:
                alone = model(input_ids=torch.from_numpy(document.input_ids).long()[None], use_cache=False).logits[0]
                torch.testing.assert_close(packed[at, start : start + len(document)], alone, atol=2e-6, rtol=1e-5)
                start += len(document)
    check_packing(model, vocab_size=64, seq_len=32)


def test_a_model_that_mixes_packed_examples_is_found_out() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])

    def with_cache(**batch: Any) -> Any:
        return model(**{**batch, "use_cache": True})  # what switches transformers' detection off

    with pytest.raises(ConfigError, match="lets packed examples attend to each other"):
        check_packing(with_cache, vocab_size=64, seq_len=32)
