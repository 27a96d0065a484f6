"""What is put away last is wanted first."""

import pytest

from offload_rt.stash import HostStash
from planners.activations import Action, ActivationPolicy, Chunk, Treatment
from planners.placement import Tier
from tests.tokenwise import batch, build, cut, policy, step

NEAR = 3
"""Tensors that one operation saves are asked for in the order in which it saved them."""
AGAIN, AWAY = Treatment(action=Action.RECOMPUTE), Treatment(action=Action.SWAP, tier=Tier.HOST)


class Order:
    """Which tensor was put away when, and which was asked for."""

    def __init__(self, monkeypatch):
        self.num_put, self.asked = 0, []
        put = HostStash.put

        def numbered(stash, tensor):
            stashed, number = put(stash, tensor), self.num_put
            self.num_put += 1
            load = stashed.load
            stashed.load = lambda: (self.asked.append(number), load())[1]
            return stashed

        monkeypatch.setattr(HostStash, "put", numbered)


BY_GROUP = {"before": AWAY, "qkv": AWAY, "result": AWAY}
CHOSEN = {
    "whole": policy(1.0, 1),
    "4 chunks": policy(1.0, 4),
    "half of them": policy(0.5, 4),
    "up to attention": ActivationPolicy(chunks=(Chunk(num_tokens=5, action=Action.RECOMPUTE, **BY_GROUP),)),
    "without operands": ActivationPolicy(
        chunks=(Chunk(num_tokens=5, action=Action.SWAP, tier=Tier.HOST, qkv=AGAIN),)
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "chosen"), [*(("llama", name) for name in CHOSEN), ("gpt2", "4 chunks"), ("cohere", "whole")]
)
def test_backward_asks_in_the_reverse_of_the_order_in_which_forward_put_away(architecture, chosen, monkeypatch):
    model = build(architecture)
    order = Order(monkeypatch)
    cut(model, CHOSEN[chosen], stash_bytes=16 << 20)
    step(model, batch())
    asked = list(dict.fromkeys(order.asked))
    assert len(asked) == order.num_put > 20
    place_of = {number: place for place, number in enumerate(sorted(asked, reverse=True))}
    assert max(abs(place - place_of[number]) for place, number in enumerate(asked)) < NEAR
