"""From a model's shape to the workload of training it: classes of equal blocks, adapters, optimizer state.

Sizes are exact, FLOPs count products and causal attention, other operations count the bytes they move.
"""

from __future__ import annotations

from planners.plans.schedule import Phase
from planners.plans.vocabulary import RowsSize
from planners.problems.problem import HEAD_TILE_TOKENS, BlockClass, Training, Workload
from planners.shapes.cpu_attention import tiles_bytes
from planners.shapes.model import Layer, Linear, ModelShape, stored_bytes
from planners.shapes.trace import ITEM_BYTES, NUM_OPERATIONS, Saved, Transient, saved_tensors, transients
from planners.units import ProblemError, nearest

MAX_TOKENS = 1 << 34
STATE_BYTES = {"adamw": 8, "adamw-8bit": 2, "adamw-bf16": 4, "lion": 4, "sgd": 4, "adafactor": 0}
"""Moments per parameter, of the optimizers that `offload-rt train` offers; `sgd` has momentum. Without the scales of
8-bit moments (a 64th) and Adafactor's sums of rows and columns.
"""


SUMMED_BYTES = 4
"""Of a gradient that waits for those of further micro-batches: they are added in float32."""
SUMMING_SHARE = 0.4
"""Of the processor's time to step a parameter, that adding a gradient to its sum takes: both wait for memory, 10 bytes
a parameter (2 + 4 read, 4 written) beside AdamW's 26 to 28."""


def make_workload(
    shape: ModelShape,
    *,
    batch_size: int,
    seq_len: int,
    bits: int | None = None,
    rank: int | None = 16,
    targets: tuple[str, ...] = (),
    optimizer: str = "adamw",
    clips: bool = False,
    commit_every: int | None = None,
    accumulation_steps: int = 1,
    summing_seconds_per_param: float = 0.0,
    num_threads: int = 0,
) -> Workload:
    """What training `shape` takes. `rank=None` trains everything; otherwise adapters of that rank do. num_threads: of a
    CPU that computes (`Device.num_threads`).

    accumulation_steps: micro-batches of a step, one after the other. summing_seconds_per_param: that a gradient keeps
    the processor to which it is added, where everything trains.

    `targets` names the linears that get adapters, all (but for experts and routers) when empty. Raises `ProblemError`.
    """
    sizes = (
        ("batch_size", batch_size, 1 << 24), ("seq_len", seq_len, 1 << 28),
        ("accumulation_steps", accumulation_steps, 1 << 20),
    )  # fmt: skip
    for field, value, high in sizes:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise ProblemError(f"{field}: must be a whole number between 1 and {high}, got {value!r}")
    if batch_size * seq_len > MAX_TOKENS:
        raise ProblemError(f"batch_size x seq_len: {batch_size * seq_len} tokens a step is more than {MAX_TOKENS}")
    if bits not in (None, 4):
        raise ProblemError(f"bits: {bits!r} is not offered; allowed: 4, none")
    if bits is not None and rank is None:
        raise ProblemError("bits: 4-bit weights are frozen; full fine-tuning trains them: give one of the two")
    if rank is not None and not 1 <= rank <= 65536:
        raise ProblemError(f"adapters: r must be between 1 and 65536, got {rank}")
    if optimizer not in STATE_BYTES:
        raise ProblemError(f"optimizer: unknown {optimizer!r}; {nearest(optimizer, STATE_BYTES)}")
    names = {linear.name.rpartition(".")[2] for layer in shape.layers for linear in layer.linears}
    for target in targets:
        if target not in names:
            raise ProblemError(f"adapters: no linear is called {target!r}; {nearest(target, names)}")
    maker = _Maker(shape, seq_len=seq_len, bits=bits, rank=rank, targets=targets, num_threads=num_threads)
    full = rank is None
    several = full and accumulation_steps > 1
    return Workload(
        name=shape.name,
        training=Training.FULL if full else Training.ADAPTERS,
        classes=maker.classes(),
        hidden=shape.hidden,
        batch_size=batch_size,
        seq_len=seq_len,
        # Full: 16-bit weights with an fp32 master. Adapters are fp32 themselves.
        state_bytes_per_param=STATE_BYTES[optimizer] + (4 if full else 0),
        gradient_bytes_per_param=2 if full else 4,
        weight_bytes_per_param=2 if full else 4,
        clips=clips,
        commit_every=commit_every,
        micro_batches=accumulation_steps,
        summed_gradient_bytes_per_param=SUMMED_BYTES if several else 0,
        summing_seconds_per_param=summing_seconds_per_param if several else 0.0,
    )


class _Maker:
    """Turns layers into classes."""

    def __init__(
        self,
        shape: ModelShape,
        *,
        seq_len: int,
        bits: int | None,
        rank: int | None,
        targets: tuple[str, ...],
        num_threads: int,
    ) -> None:
        self.shape = shape
        self.seq_len = seq_len
        self.bits = bits
        self.rank = rank
        self.targets = targets
        self.tiles_bytes = 0
        if num_threads:
            self.tiles_bytes = tiles_bytes(num_threads=num_threads, seq_len=seq_len, item_bytes=ITEM_BYTES)

    def classes(self) -> tuple[BlockClass, ...]:
        """Embedding, one class for each kind of layer, head."""
        shape = self.shape
        kinds = list(dict.fromkeys(shape.layers))
        layers = []
        for number, kind in enumerate(kinds):
            indices = [index for index, layer in enumerate(shape.layers) if layer == kind]
            name = "layer" if len(kinds) == 1 else f"layer {number}"
            blocks = tuple(f"{shape.layer_prefix}.{index}" for index in indices)
            layers.append(self._layer(kind, name, blocks, tuple(index + 1 for index in indices)))
        return (self._embedding(), *layers, self._head(len(shape.layers) + 1))

    def _adapter(self, linear: Linear) -> int:
        """Parameters of a linear's adapter."""
        stacked = linear.count > 1 or linear.stage == "router"
        named = not self.targets or linear.name.rpartition(".")[2] in self.targets
        if self.rank is None or stacked or not named:
            return 0
        return self.rank * (linear.in_features + linear.out_features)

    def _layer(self, layer: Layer, name: str, blocks: tuple[str, ...], positions: tuple[int, ...]) -> BlockClass:
        linears, hidden = layer.linears, layer.hidden
        quantized = [
            linear for linear in linears if self.bits is not None and linear.stage != "router"
        ]  # bitsandbytes leaves routers alone
        stored = sum(stored_bytes(linear, self.bits if linear in quantized else None) for linear in linears)
        adapters = sum(map(self._adapter, linears))
        products = float(sum(linear.flops_per_token for linear in linears))
        full = self.rank is None
        saved = saved_tensors(layer, self._adapter)
        return BlockClass(
            name=name,
            blocks=blocks,
            positions=positions,
            is_layer=True,
            stored_bytes=stored + ITEM_BYTES * layer.other_params,
            decoded_bytes=sum(ITEM_BYTES * linear.weights for linear in quantized),
            largest_linear_bytes=max((ITEM_BYTES * linear.weights for linear in quantized), default=0),
            trainable_params=layer.params if full else adapters,
            forward_flops=products + 2 * adapters,
            # Gradients of inputs, and of whatever trains.
            backward_flops=2 * products if full else products + 4 * adapters,
            attention_flops=layer.attention.flops_per_token(self.seq_len),
            moved_bytes=ITEM_BYTES * (12 * hidden + 2 * layer.mlp_features),
            saved=saved,
            attention_bytes=sum(s.bytes_per_token for s in saved if s.name in ("qkv", "attention")),
            attention_groups=layer.attention.kv_heads,
            transients=transients(layer),
            attention_tiles_bytes=self.tiles_bytes,
            num_operations=NUM_OPERATIONS,
        )

    def _embedding(self) -> BlockClass:
        shape = self.shape
        # A tied table is the head's: it is fetched for the product, and its rows are looked up where it lies.
        params = 0 if shape.head_params < shape.vocabulary * shape.hidden else shape.embedding_params
        row = ITEM_BYTES * shape.hidden
        rows = None
        if params and self.rank is not None and params % shape.vocabulary == 0:
            width = params // shape.vocabulary
            rows = RowsSize(num_rows=shape.vocabulary, row_bytes=ITEM_BYTES * width, most_rows=self.seq_len)
        return BlockClass(
            name="embedding", blocks=(shape.embedding_name,), positions=(0,), is_layer=False,
            stored_bytes=ITEM_BYTES * params, decoded_bytes=0, largest_linear_bytes=0,
            trainable_params=params if self.rank is None else 0, forward_flops=0.0, backward_flops=0.0,
            attention_flops=0.0, moved_bytes=2 * row, saved=(), attention_bytes=0.0, attention_groups=1,
            transients=_workspace(row, row), visits_backward=False, rows=rows,
        )  # fmt: skip

    def _head(self, position: int) -> BlockClass:
        shape = self.shape
        tied = shape.head_params < shape.vocabulary * shape.hidden
        params = shape.head_params + shape.final_params + (shape.embedding_params if tied else 0)
        full = self.rank is None
        products = 2.0 * shape.vocabulary * shape.hidden
        row = ITEM_BYTES * shape.hidden
        product = None
        matrix = shape.embedding_params if tied else shape.head_params
        if not full and matrix == shape.vocabulary * shape.hidden:
            product = RowsSize(num_rows=shape.vocabulary, row_bytes=row, most_rows=self.seq_len)
        return BlockClass(
            name="head", blocks=(shape.head_name,), positions=(position,), is_layer=False,
            stored_bytes=ITEM_BYTES * params, decoded_bytes=0, largest_linear_bytes=0,
            trainable_params=params if full else 0, forward_flops=products,
            backward_flops=2 * products if full else products, attention_flops=0.0, moved_bytes=4 * row,
            saved=(Saved(name="input", bytes_per_token=row, recomputable=False),), attention_bytes=0.0,
            attention_groups=1, transients=_workspace(row, 2 * row),
            # Logits in 16 and 32 bit, log-softmax, and the gradients of both.
            tile_bytes=HEAD_TILE_TOKENS * shape.vocabulary * (2 * ITEM_BYTES + 12),
            product=product, rows=product if tied else None,
        )  # fmt: skip


def _workspace(forward: int, backward: int) -> tuple[Transient, ...]:
    """Of a block that is one operation."""
    sizes = ((Phase.FORWARD, forward), (Phase.BACKWARD, backward))
    return tuple(Transient(name="workspace", bytes_per_token=n, phase=phase, begin=0, end=1) for phase, n in sizes)
