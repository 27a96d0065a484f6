"""Every rule gives what its optimizer gives in memory: whole, by ranges, over steps, again from the same state."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offload_rt import optim
from offload_rt.errors import ConfigError
from offload_rt.optimizer.rules import AdamWRule, TorchRule, Update, UpdateRule, rule_for
from tests.conftest import EngineMaker, build_lora

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw bf16": lambda p: optim.AdamW(p, lr=1e-2, moments="bfloat16"),
    "adamw 8bit": lambda p: optim.AdamW(p, lr=1e-2, moments="8bit"),
    "lion": lambda p: optim.Lion(p, lr=1e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}
SHAPES = [(1,), (), (5,), (7, 1), (1, 7), (16, 33), (2, 3, 5), (300,)]
STEPS = 4


@pytest.fixture(autouse=True)
def ieee_square_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_full_parity: torch's own square roots are a unit off here and there under AVX-512."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda values: torch.as_tensor(np.sqrt(values.numpy())))


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)


class Tiered:
    """A parameter in ranges, stepped by a rule from nothing but its tensors and scalars."""

    def __init__(self, rule: UpdateRule, start: Tensor, cuts: list[int]) -> None:
        self.rule, self.shape = rule, tuple(start.shape)
        self.ranges = list(zip([0, *cuts], [*cuts, start.numel()], strict=True))
        self.masters = [start.reshape(-1)[a:b].clone().view(self._shape(a, b)) for a, b in self.ranges]
        self.states = [
            {t.name: torch.zeros(t.shape, dtype=t.dtype) for t in rule.state(tuple(m.shape))} for m in self.masters
        ]
        self.scalars: Any = {}
        self.weights = [torch.empty(m.shape, dtype=torch.bfloat16) for m in self.masters]

    def _shape(self, begin: int, end: int) -> tuple[int, ...]:
        return self.shape if not self.ranges[1:] else (end - begin,)

    def step(self, grad: Tensor, group: Any, step: int, grad_scale: float = 1.0) -> None:
        self.scalars = [self.rule.update(of) for of in self.updates(grad, group, step, grad_scale)][0]

    def updates(self, grad: Tensor, group: Any, step: int, grad_scale: float = 1.0) -> list[Update]:
        return [
            Update(
                master=master, grad=grad.reshape(-1)[begin:end].view(master.shape), grad_scale=grad_scale, state=state,
                scalars=self.scalars, weight=weight, group=group, step=step,
            )
            for (begin, end), master, state, weight in zip(
                self.ranges, self.masters, self.states, self.weights, strict=True
            )
        ]  # fmt: skip

    def bits(self) -> list[Tensor]:
        return [tensor.clone() for state in self.states for tensor in state.values()] + [
            tensor.clone() for tensor in (*self.masters, *self.weights)
        ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rule_agrees_with_its_optimizer_in_memory(name: str, shape: tuple[int, ...]) -> None:
    start = gradient(shape, 99).float()
    master = nn.Parameter(start.clone())
    optimizer = OPTIMIZERS[name]([master])
    rule = rule_for(optimizer)
    whole = Tiered(rule, start, [])
    ranged = Tiered(rule, start, [256]) if start.numel() > 256 and rule.elementwise else whole
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        grad = gradient(shape, step)
        master.grad = grad.float() * 0.5
        optimizer.step()
        for tiered in {id(t): t for t in (whole, ranged)}.values():
            tiered.step(grad, optimizer.param_groups[0], step, grad_scale=0.5)
            assert torch.equal(torch.cat([m.reshape(-1) for m in tiered.masters]), master.detach().reshape(-1))
            assert torch.equal(
                torch.cat([w.reshape(-1) for w in tiered.weights]), master.detach().to(torch.bfloat16).reshape(-1)
            )


def test_ranges_were_tried_of_every_optimizer_that_steps_by_element() -> None:
    elementwise = {
        name for name, make in OPTIMIZERS.items() if rule_for(make([nn.Parameter(torch.ones(2))])).elementwise
    }
    assert elementwise == {
        "adamw", "adamw bf16", "adamw 8bit", "lion", "sgd", "sgd momentum", "adam", "rmsprop", "adagrad"
    }  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_done_again_from_the_same_state_has_the_same_bits(name: str) -> None:
    """With another scale first, as where the norm asked for clipping: scalars of the first try must not be touched."""
    optimizer = OPTIMIZERS[name]([nn.Parameter(torch.ones(6, 4))])
    rule = rule_for(optimizer)
    once, twice = (Tiered(rule, gradient((6, 4), 99).float(), []) for _ in range(2))
    for step in range(1, STEPS + 1):
        before = [state.copy() for state in twice.states], twice.scalars
        kept = [{k: v.clone() for k, v in state.items()} for state in twice.states], twice.masters[0].clone()
        twice.step(gradient((6, 4), step), optimizer.param_groups[0], step, grad_scale=1.0)
        twice.scalars = before[1]
        for state, old in zip(twice.states, kept[0], strict=True):
            for key in state:
                state[key].copy_(old[key])
        twice.masters[0].copy_(kept[1])
        for tiered in (once, twice):
            tiered.step(gradient((6, 4), step), optimizer.param_groups[0], step, grad_scale=0.25)
        assert all(torch.equal(a, b) for a, b in zip(once.bits(), twice.bits(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_together_have_the_bits_of_one_after_the_other(name: str) -> None:
    """Of two param groups, by turns, and of parameters that have made other numbers of steps."""
    optimizer = OPTIMIZERS[name]([nn.Parameter(torch.ones(2))])
    rule = rule_for(optimizer)
    groups = [optimizer.param_groups[0], {**optimizer.param_groups[0], "lr": 3e-3}]
    alone, together = ([Tiered(rule, gradient(shape, 99).float(), []) for shape in SHAPES] for _ in range(2))
    for step in range(1, STEPS + 1):
        arrived = [number for number in range(len(SHAPES)) if number < 2 * step]
        made = {number: (gradient(SHAPES[number], step), groups[number % 2], step - number // 2) for number in arrived}
        for number in arrived:
            alone[number].step(*made[number])
        found = rule.update_all([of for number in arrived for of in together[number].updates(*made[number])])
        for number, scalars in zip(arrived, found, strict=True):
            together[number].scalars = scalars
            bits = alone[number].bits(), together[number].bits()
            assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


class Spoiling(torch.optim.SGD):
    """Counts its instances, and writes to the gradients that it is given."""

    num_made = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        Spoiling.num_made += 1
        super().__init__(*args, **options)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.zero_()


@pytest.mark.parametrize("in_place", [False, True])
def test_updates_together_take_one_instance_a_group_and_gradients_that_may_come_again_are_copied(
    in_place: bool,
) -> None:
    group = {**torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1).param_groups[0]}
    rule = rule_for(Spoiling([nn.Parameter(torch.ones(2))], lr=0.1), in_place=in_place)
    tiered = [Tiered(rule, torch.ones(3), []) for _ in range(5)]
    grads = [torch.ones(3) for _ in tiered]
    Spoiling.num_made = 0
    rule.update_all([of for one, grad in zip(tiered, grads, strict=True) for of in one.updates(grad, group, 1)])
    assert Spoiling.num_made == 1
    assert all(bool(grad.any()) is not in_place for grad in grads)


def test_what_cannot_be_stepped_by_parameter_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match="LBFGS does not step each parameter by itself"):
        rule_for(torch.optim.LBFGS([parameter]))
    with pytest.raises(ConfigError, match="amsgrad"):
        rule_for(torch.optim.AdamW([parameter], amsgrad=True))
    assert isinstance(rule_for(torch.optim.AdamW([parameter])), AdamWRule)
    assert isinstance(rule_for(torch.optim.SGD([parameter], lr=1.0)), TorchRule)


def test_parameters_in_16_bits_are_refused_where_they_have_no_masters(make_engine: EngineMaker) -> None:
    """When the engine is made, and by the optimizer on its own before anything is written."""
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ConfigError, match=r"steps float32 parameters, and one of shape \(2,\) is in torch.bfloat16"):
        optim.AdamW([parameter]).step()
    model = build_lora(num_layers=1)
    for adapter in (p for p in model.parameters() if p.requires_grad):
        adapter.data = adapter.data.bfloat16()
    with pytest.raises(ConfigError, match="steps float32 parameters"):
        make_engine(model, optimizer=lambda parameters: optim.AdamW(parameters, lr=1e-2, moments="8bit"))


@pytest.mark.parametrize("moments", optim.MOMENTS)
def test_moments_of_a_state_dict_that_is_loaded_are_stored_as_they_were(moments: optim.Moments) -> None:
    """torch casts what it loads to the parameters' dtype, and makes the number of steps a tensor in float32."""
    twins = [nn.Parameter(torch.linspace(-1, 1, 300)) for _ in range(2)]
    one, other = (optim.AdamW([parameter], lr=1e-2, moments=moments) for parameter in twins)
    for number in range(4):
        for parameter, optimizer in zip(twins, (one, other), strict=True):
            parameter.grad = torch.linspace(-2, 1, 300).roll(number).square()
            optimizer.step()
        assert torch.equal(*twins), number
        other = optim.AdamW([twins[1]], lr=1e-2, moments=moments)
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        assert list(map(type, other.state[twins[1]].values())) == list(map(type, one.state[twins[0]].values()))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_autograd_sees_every_step(name: str) -> None:
    parameter = nn.Parameter(torch.ones(300))
    optimizer = OPTIMIZERS[name]([parameter])
    before = parameter.square().sum()
    parameter.grad = torch.ones(300)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()
