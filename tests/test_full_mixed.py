"""Layers that train in full, beside everything else that a model does: chunks of tokens, checkpointing, tied and frozen
parts, adapters, evaluation, generation, and a backward pass that is cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from offload_rt.errors import ConfigError
from offload_rt.wiring.runtime_options import RuntimeOptions
from planners.plans.activations import Action, ActivationPolicy, Chunk
from planners.plans.plan import Tier
from tests import parity
from tests.full_parity import state_of, training_of
from tests.parity import BATCH_SIZE, FAMILIES, SEQ_LEN, in_pairs, in_turns, micro_batch
from tests.tiny_training import ON_NVME, Made, Plain, adamw, differences

IN_PLACE: dict[str, Any] = {}
NVME: dict[str, Any] = {"rest": Tier.NVME, "state": ON_NVME, "piece_elements": 8192}
PLACES = {"in place": IN_PLACE, "on NVME": NVME, "on NVME, recorded": {**NVME, "record": True, "poison": True}}
IN_TWO = ("in place", "on NVME")


def build(family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(7)
    return FAMILIES[family]().to(dtype).train().requires_grad_(True)


def make(model: nn.Module, folder: Path, place: str, options: dict[str, Any] | None = None, **arguments: Any) -> Made:
    given = {"optimizer": adamw, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, **arguments}
    if place != "in place":
        given["nvme"] = folder
    return Made(model, options=RuntimeOptions(**{**PLACES[place], **(options or {})}), **given)


def steps(run: Any, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        torch.manual_seed(number)
        loss = run(**micro_batch(number, 0)).loss
        run.backward(loss)
        run.step()
        losses.append(float(loss.detach()))
    return losses


def check(model: Callable[[], nn.Module], run: Made, *, twin: nn.Module | None = None, num_steps: int = 3) -> None:
    """Losses, masters and weights are those of plain PyTorch."""
    plain = Plain(model() if twin is None else twin)
    expected = steps(plain, range(num_steps))
    with run:
        assert steps(run, range(num_steps)) == expected
        assert differences(plain.state(), run.state()) == []
        recorder = run._runtime.recorder
        assert recorder is None or [str(race) for race in recorder.check()] == []


def whole(action: Action) -> ActivationPolicy:
    return ActivationPolicy(chunks=(chunk(SEQ_LEN, action),))


def chunk(num_tokens: int, action: Action) -> Chunk:
    return Chunk(num_tokens=num_tokens, action=action, tier=Tier.NVME if action is Action.SWAP else None)


@pytest.mark.parametrize("place, action", in_turns(reversed(PLACES), [Action.RECOMPUTE, Action.SWAP, Action.KEEP]))
def test_one_chunk_of_tokens_is_bit_equal_to_plain(place: str, action: Action, tmp_path: Path) -> None:
    if place == "in place" and action is Action.SWAP:
        pytest.skip("in place there is no other tier")
    options = {"activations": whole(action)}
    run = make(build(), tmp_path, place, options)
    check(build, run)
    report = run.report()["tokenwise"]
    assert report["num_passes"] == 4 * 3 and report["num_whole"] == 0
    assert (report["swapped_bytes"] > 0) is (action is Action.SWAP)


def test_several_chunks_of_tokens_have_the_same_bits_wherever_state_and_activations_are(tmp_path: Path) -> None:
    """A cut changes the order of sums, in which no placement has a part."""
    found = []
    for place in ("in place", "on NVME, recorded"):
        for action in (Action.RECOMPUTE, Action.SWAP, Action.KEEP):
            if place == "in place" and action is Action.SWAP:
                continue
            folder = tmp_path / f"{place} {action.value}"
            folder.mkdir()
            half = chunk(SEQ_LEN // 2, action)
            options = {"activations": ActivationPolicy(chunks=(half, half))}
            with make(build(dtype=torch.float32), folder, place, options) as run:
                losses = steps(run, range(2))
                assert run.report()["tokenwise"]["refused"] == {}
                found.append((losses, run.state()))
    assert all(losses == found[0][0] and differences(found[0][1], state) == [] for losses, state in found[1:])
    plain = Plain(build(dtype=torch.float32))
    assert steps(plain, range(2)) == pytest.approx(found[0][0], rel=1e-4)


@pytest.mark.parametrize("place, reentrant", in_turns(IN_TWO, (False, True)))
def test_a_model_whose_gradient_checkpointing_is_on(place: str, reentrant: bool, tmp_path: Path) -> None:
    def built() -> nn.Module:
        model: Any = build()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        return model

    check(built, make(built(), tmp_path, place))


@pytest.mark.parametrize("place, family", in_turns(reversed(PLACES), ("llama", "qwen")))
def test_frozen_edges_that_stream_tied_or_not_below_and_above_layers_that_train(
    place: str, family: str, tmp_path: Path
) -> None:
    """llama's embedding is its head."""

    def built() -> nn.Module:
        model: Any = build(family)
        for edge in (model.get_input_embeddings(), model.get_output_embeddings()):
            edge.requires_grad_(False)
        return model

    streamed = place != "in place"
    run = make(built(), tmp_path, place, {"stream_edges": streamed, "head_chunk_tokens": 8})
    assert ("edges" in {ring.name for ring in run.plan.rings}) is streamed
    plain = Plain(built())
    expected = steps(plain, range(3))
    with run:
        assert steps(run, range(3)) == pytest.approx(expected, rel=1e-2), "the loss is taken in tiles"
        assert run.report()["loss_head"]["num_tiles"] > 0
    (tmp_path / "whole").mkdir()
    check(built, make(built(), tmp_path / "whole", place, {"stream_edges": streamed}))


@pytest.mark.parametrize("place, lora, bits", in_pairs(IN_TWO, (False, True), (4, None)))
def test_layers_that_train_among_frozen_ones_with_and_without_adapters(
    place: str, bits: int | None, lora: bool, tmp_path: Path
) -> None:
    def built() -> nn.Module:
        model: Any = build(dtype=torch.float32).requires_grad_(False)
        if lora:
            config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
            model = peft.get_peft_model(model, config)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.02)
        layers = model.get_submodule("base_model.model.model.layers" if lora else "model.layers")
        for index in (1, 3):
            layers[index].requires_grad_(True)
        return model.train()  # type: ignore[no-any-return]

    twin = built()
    if bits == 4:
        parity.decode_in_place(twin)
    run = make(built(), tmp_path, place, bits=bits)
    check(built, run, twin=twin)
    assert (run.report()["decodes"] > 0) is (bits == 4)


@pytest.mark.parametrize("place", IN_TWO)
def test_evaluation_and_generation_between_steps_see_the_last_step_and_change_nothing(
    place: str, tmp_path: Path
) -> None:
    prompt = {"input_ids": torch.tensor([[3, 5, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}

    def go(run: Any) -> list[Any]:
        found: list[Any] = []
        for number in range(3):
            found += steps(run, range(number, number + 1))
            run.model.eval()
            with torch.no_grad():
                batch = micro_batch(9, 0)
                del batch["labels"]
                found.append(run(**batch).logits.clone())
                for use_cache in (True, False):
                    text = run.model.generate(**prompt, max_new_tokens=4, do_sample=False, use_cache=use_cache)
                    found.append(text)
            run.model.train()
        return found

    plain = Plain(build())
    expected = go(plain)
    with make(build(), tmp_path, place) as run:
        for want, got in zip(expected, go(run), strict=True):
            assert torch.equal(torch.as_tensor(want), torch.as_tensor(got))
        assert differences(plain.state(), run.state()) == []


@pytest.mark.parametrize("place, zeroed", in_turns(IN_TWO, (False, True)))
def test_a_backward_pass_that_is_cut_off_is_dropped_or_told_and_training_goes_on(
    place: str, zeroed: bool, tmp_path: Path
) -> None:
    """When it is cut off, the layers above have been stepped already where updates run behind the backward pass."""

    def fail(gradient: torch.Tensor) -> None:
        raise KeyError("broken on purpose")

    plain = Plain(build())
    expected = steps(plain, range(4))
    with make(build(), tmp_path, place) as run:
        assert steps(run, range(2)) == expected[:2]
        layer = run.model.model.layers[1]
        handle = layer.register_forward_hook(lambda *a: a[-1].register_hook(fail) and None)
        with pytest.raises(KeyError):
            run.backward(run(**micro_batch(7, 0)).loss)
        handle.remove()
        if not zeroed:  # their gradients would be summed, as in plain PyTorch, where one micro-batch was declared
            with pytest.raises(ConfigError, match="received gradients|between backward and step"):
                steps(run, range(2, 3))
        assert run.optimizer is not None
        run.optimizer.zero_grad()
        assert steps(run, range(2, 4)) == expected[2:]
        assert differences(plain.state(), run.state()) == []
        ahead = training_of(run).counters.num_ahead_of_norm
        assert (ahead > 0) is (place != "in place")


def test_gradients_looked_at_and_clipped_by_hand_are_those_of_plain_pytorch(tmp_path: Path) -> None:
    plain = Plain(build())
    with make(build(), tmp_path, "on NVME", max_grad_norm=1e6) as run:
        for number in range(3):
            plain.backward(plain(**micro_batch(number, 0)).loss)
            run.backward(run(**micro_batch(number, 0)).loss)
            gradients = dict(run.gradients())
            expected = {name: master.grad for name, master in plain.masters.items() if master.grad is not None}
            assert gradients.keys() == expected.keys()
            assert all(torch.equal(gradients[name].float(), gradient) for name, gradient in expected.items())
            assert torch.equal(run.clip_grad_norm_(0.5), plain.clip_grad_norm_(0.5))
            plain.step()
            run.step()
        assert differences(plain.state(), state_of(training_of(run))) == []
        assert training_of(run).counters.num_clipped == 3
