"""The floors of the design, held by a machine: a module imports only strictly lower floors.

    11  cli                                     |  5  layers.discover, guards, running.steps
    10  training                                |  4  tiering
     9  wiring.assembly < running < _engine     |  3  storage: store, commit_log, scratch
     8  checkpoint, optimizer, profiling, plans |  2  transfers, quantized.decoder
     7  layers.autograd, vocabulary, tokenwise  |  1  memory.arena, quantized.codec, adamw
     6  layers.executor                         |  0  errors, config, ...

Sub-floors (1.5 above 1.0) order what stands on one floor. A folder is a subject: most of its modules stand on the floor
said here, others where they must. Where a folder has one floor as a whole, its modules may import each other, in no
circle.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    "offload_rt": 0.0,  # the lazy front door; what it resolves late is exempt, see LAZY
    "offload_rt.errors": 0.0,
    "offload_rt.native": 0.0,
    "offload_rt.storage.mounts": 0.0,
    "offload_rt.cache": 0.0,
    "offload_rt.meter": 0.0,
    "offload_rt.spans": 0.2,
    "offload_rt.memory.mapped": 0.5,
    "offload_rt.patience": 0.0,
    "offload_rt.memory.mapped_blocks": 0.5,
    "offload_rt.memory.memory_groups": 0.0,
    "offload_rt.memory.process_memory": 0.1,
    "offload_rt.memory.cudart": 0.5,
    "offload_rt.memory.cuda_memory": 0.5,
    "offload_rt.quantized.nf4_layout": 0.0,
    "offload_rt.closing": 0.5,
    "offload_rt.config": 0.5,
    "offload_rt.tensor_spec": 0.5,
    "offload_rt.dtypes": 0.5,
    "offload_rt.native_call": 0.5,
    "offload_rt.quantized.nf4_torch": 1.0,
    "offload_rt.memory.arena": 1.0,
    "offload_rt.checksum": 1.0,
    "offload_rt.running.comparison": 1.0,
    "offload_rt.memory.parted": 1.2,
    "offload_rt.memory.transients": 1.2,
    "offload_rt.memory.heap": 1.0,
    "offload_rt.memory.allocations": 1.0,
    "offload_rt.layers.turns": 1.0,
    "offload_rt.layers.readers": 1.0,
    "offload_rt.random_state": 1.0,
    "offload_rt.adamw.blockwise": 1.0,
    "offload_rt.adamw.cpu_adam_torch": 1.2,
    "offload_rt.quantized.nf4_triton": 1.2,
    "offload_rt.adamw.adam_triton": 1.5,
    "offload_rt.quantized.codec": 1.5,
    "offload_rt.quantized.nf4_product_triton": 1.2,
    "offload_rt.quantized.nf4_products": 1.7,
    "offload_rt.adamw.cpu_adam": 1.5,
    "offload_rt.memory.pinning": 1.5,
    "offload_rt.quantized.prequantized": 1.5,
    "offload_rt.transfers.io_records": 1.9,
    "offload_rt.transfers.recording": 2.0,
    "offload_rt.quantized.decoder": 2.0,
    "offload_rt.transfers.file_io": 2.0,
    "offload_rt.transfers.device_streams": 2.2,
    "offload_rt.transfers.locked_ring": 2.25,
    "offload_rt.transfers.streams": 2.3,
    "offload_rt.transfers.device_times": 2.4,
    "offload_rt.transfers.device_spans": 2.4,
    "offload_rt.transfers.device_cuda": 2.4,
    "offload_rt.emulation": 0.8,
    "offload_rt.transfers.throttle": 2.2,
    "offload_rt.transfers.transfer": 2.4,
    "offload_rt.transfers.device_copies": 2.5,
    "offload_rt.transfers.links": 2.6,
    "offload_rt.storage.durable": 1.0,
    "offload_rt.storage.drives": 2.7,
    "offload_rt.storage.stripes": 2.7,
    "offload_rt.storage.drive_files": 2.7,
    "offload_rt.storage.sequential_writer": 2.8,
    "offload_rt.storage.commit_record": 1.5,
    "offload_rt.storage.store": 3.0,
    "offload_rt.storage.store_part": 3.1,
    "offload_rt.storage.commit_layout": 3.0,
    "offload_rt.storage.commit_log": 3.1,
    "offload_rt.storage.commit_peek": 3.1,
    "offload_rt.storage.snapshot": 3.2,
    "offload_rt.storage.scratch": 3.0,
    "offload_rt.tiering.tiers": 4.0,
    "offload_rt.tiering.rows": 4.0,
    "offload_rt.tiering.stash": 4.0,
    "offload_rt.tiering.device_stash": 4.5,
    "offload_rt.tiering.paced_stash": 4.5,
    "offload_rt.layers.block": 5.0,
    "offload_rt.layers.caches": 1.0,
    "offload_rt.layers.buffers": 1.0,
    "offload_rt.layers.discover": 5.0,
    "offload_rt.guards.integrity": 5.0,
    "offload_rt.guards.batch_check": 5.0,
    "offload_rt.guards.conversions": 5.0,
    "offload_rt.guards.additions": 5.0,
    "offload_rt.guards.adapter_kinds": 5.0,
    "offload_rt.guards.late_adapters": 5.2,
    "offload_rt.guards.frozen_weights": 5.2,
    "offload_rt.guards.copies": 5.2,
    "offload_rt.guards.wrappers": 5.2,
    "offload_rt.guards.compiling": 5.2,
    "offload_rt.guards.quantized": 5.0,
    "offload_rt.running.steps": 5.0,
    "offload_rt.running.drift": 5.1,
    "offload_rt.layers.executor": 6.0,
    "offload_rt.layers.access": 6.5,
    "offload_rt.quantized.packed_linear": 6.7,
    "offload_rt.layers.last_product": 6.8,
    "offload_rt.layers.switches": 6.7,
    "offload_rt.layers.fingerprints": 6.7,
    "offload_rt.layers.surroundings": 6.7,
    "offload_rt.layers.layer_call": 6.8,
    "offload_rt.vocabulary.backbone": 6.8,
    "offload_rt.layers.autograd": 7.0,
    "offload_rt.vocabulary.edge": 7.0,
    "offload_rt.vocabulary.lookup": 7.0,
    "offload_rt.vocabulary.tiled_linear": 7.0,
    "offload_rt.tokenwise": 7.5,
    "offload_rt.vocabulary.vocabulary_loss": 7.1,
    "offload_rt.vocabulary.model_tail": 7.1,
    "offload_rt.vocabulary.loss_head": 7.2,
    "offload_rt.checkpoint": 8.0,
    "offload_rt.profiling.profile": 8.0,
    "offload_rt.optim": 1.7,
    "offload_rt.optimizer": 8.2,
    "offload_rt.profiling.calibrate": 8.4,
    "offload_rt.arguments": 8.5,
    "offload_rt.profiling.bench": 8.2,
    "offload_rt.wiring.runtime_options": 8.45,
    "offload_rt.wiring.workload": 8.5,
    "offload_rt.plans.workload_sizes": 8.52,
    "offload_rt.plans.plan_options": 8.55,
    "offload_rt.profiling.workbench": 8.46,
    "offload_rt.profiling.drive_profile": 8.47,
    "offload_rt.profiling.block_profile": 8.48,
    "offload_rt.profiling.edge_profile": 8.48,
    "offload_rt.profiling.chunk_profile": 8.5,
    "offload_rt.profiling.profile_cost": 8.62,
    "offload_rt.profiling.measured_sizes": 8.4,
    "offload_rt.wiring.adapter_draft": 8.6,
    "offload_rt.plans.planning_tokens": 8.6,
    "offload_rt.plans.planning_blocks": 8.65,
    "offload_rt.plans.planning_budgets": 8.65,
    "offload_rt.plans.planning": 8.7,
    "offload_rt.profiling.update_profile": 8.6,
    "offload_rt.plans.planning_together": 8.7,
    "offload_rt.plans.training_seconds": 8.72,
    "offload_rt.plans.planning_training": 8.75,
    "offload_rt.plans.planning_adapters": 8.76,
    "offload_rt.plans.asked": 8.78,
    "offload_rt.plans.device_share": 8.72,
    "offload_rt.plans.plan_check": 8.8,
    "offload_rt.tiering.resting": 8.6,
    "offload_rt.tiering.moving": 8.65,
    "offload_rt.plans.cuts": 8.8,
    "offload_rt.plans.rule_price": 8.8,
    "offload_rt.plans.plan_choice": 8.85,
    "offload_rt.wiring.state_assembly": 8.8,
    "offload_rt.wiring.weights_assembly": 8.85,
    "offload_rt.wiring.activation_assembly": 8.85,
    "offload_rt.wiring.ring_assembly": 8.85,
    "offload_rt.wiring.store_assembly": 8.85,
    "offload_rt.wiring.runtime": 8.9,
    "offload_rt.wiring.model_assembly": 8.92,
    "offload_rt.wiring.runtime_assembly": 8.95,
    "offload_rt.wiring.assembly": 9.0,
    "offload_rt.running.longest_step": 9.0,
    "offload_rt.running.rehearsal": 9.1,
    "offload_rt.running.representatives": 7.5,
    "offload_rt.running.replanning": 9.1,
    "offload_rt.running.peaks": 9.1,
    "offload_rt.running.tracked": 9.1,
    "offload_rt.running.tracing": 9.1,
    "offload_rt.report": 9.2,
    "offload_rt.running.changes": 9.3,
    "offload_rt.running.micro_batches": 9.4,
    "offload_rt.attachments": 9.4,
    "offload_rt._engine": 9.5,
    "offload_rt.training": 10.0,
    "offload_rt.cli": 11.0,
}
"""A folder's floor holds for all modules in it. Where a folder has none, each of its modules does."""

PLANNERS = [
    "errors", "units", "perfetto",
    "plans.schedule", "plans.placement", "plans.activations", "plans.layout", "plans.training_state",
    "plans.products", "plans.vocabulary", "plans.plan",
    "rule.streaming_problem", "rule.edges", "rule.shortage", "rule.filling", "rule.attempts", "rule.streaming",
    "shapes.model", "shapes.architectures", "shapes.well_known", "shapes.headers", "shapes.tensors",
    "shapes.meta_model", "shapes.models", "shapes.cpu_attention", "shapes.trace",
    "problems.hardware", "problems.measured", "problems.problem", "problems.model_workload", "problems.cost",
    "simulator.optimizer_state", "simulator.static_memory", "simulator.step_work", "simulator.division",
    "simulator.arenas", "simulator.timeline", "simulator.updates", "simulator.chunk_work", "simulator.passes",
    "simulator.simulate", "simulator.validate",
    "optimiser.expand", "optimiser.greedy", "optimiser.program", "optimiser.rows", "optimiser.vocabulary_rows",
    "optimiser.update_rows", "optimiser.saved_rows", "optimiser.steady", "optimiser.wear", "optimiser.choices",
    "optimiser.trial", "optimiser.frugal", "optimiser.mip", "optimiser.orders", "optimiser.policies",
    "optimiser.explain",
    "render", "command", "__main__",
]  # fmt: skip
"""Each may import those before it."""

USES_TORCH = {"planners.shapes.meta_model"}
"""Imports torch and transformers, inside a function, where they are there."""

LAZY = {"offload_rt"}
"""`offload_rt/__init__.py` resolves names on first use (`__getattr__`) and imports for type checkers only."""


def modules():
    for package in ("offload_rt", "planners"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


MODULES = dict(modules())


def home(module):
    """The entry of FLOORS that `module` belongs to: itself, or the folder it lies in."""
    parts = module.split(".")
    return next(
        (".".join(parts[:n]) for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in FLOORS),
        "offload_rt" if parts == ["offload_rt"] else None,
    )


def imports(source, module, is_package, known):
    """All modules that `source` imports, wherever the statement stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((inner if inner in known else base, node.lineno))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in ("import_module", "__import__"):
                found.append((str(node.args[0].value), node.lineno))
    return found


def violations(sources, of=None):
    """What is wrong in `sources`: module -> (text, is_package); in those `of` alone, where given."""
    wrong = []
    for module, (text, is_package) in (sources if of is None else {name: sources[name] for name in of}).items():
        for target, line in imports(text, module, is_package, sources):
            top = target.split(".")[0]
            if module.split(".")[0] == "planners":
                if top in ("torch", "offload_rt", "transformers", "peft") and module not in USES_TORCH:
                    wrong.append(f"{module}:{line}: planners imports {target}")
                elif top == "planners" and target != "planners":
                    mine, other = module.partition(".")[2], target.partition(".")[2]
                    if mine and PLANNERS.index(other) >= PLANNERS.index(mine):
                        wrong.append(f"{module}:{line}: imports {target}")
                continue
            if top != "offload_rt" or module in LAZY or target == "offload_rt":
                continue
            mine, other = home(module), home(target)
            if other is None or mine is None:
                wrong.append(f"{module}:{line}: {target} has no floor")
            elif mine != other and FLOORS[other] >= FLOORS[mine]:
                wrong.append(
                    f"{module}:{line}: floor {FLOORS[mine]} imports {target}, which is on floor {FLOORS[other]}"
                )
    return wrong


def circles(sources):
    """Circles of imports at the head of modules."""
    edges = {
        module: {
            target
            for target, _ in imports(text, module, is_package, sources)
            # a folder's __init__ only hands names on; importing the folder means importing what it names
            if target in sources and target != module and module not in LAZY and target not in LAZY
        }
        for module, (text, is_package) in sources.items()
    }
    found, done = [], set()

    def visit(module, trail):
        if module in trail:
            found.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(edges[module]):
                visit(target, [*trail, module])
            done.add(module)

    for module in edges:
        visit(module, [])
    return found


def only_a_folder(text, is_package):
    """A folder whose modules stand on floors of their own: nothing but a docstring."""
    return is_package and len(ast.parse(text).body) == 1


SOURCES = {name: (path.read_text(), path.name == "__init__.py") for name, path in MODULES.items()}


def test_every_module_stands_on_a_floor():
    homeless = [name for name in MODULES if home(name) is None and name.partition(".")[2] not in PLANNERS]
    assert [name for name in homeless if not only_a_folder(*SOURCES[name])] == []


def test_the_table_names_only_what_exists():
    assert [name for name in FLOORS if name not in MODULES] == []
    assert [name for name in PLANNERS if f"planners.{name}" not in MODULES] == []


def test_no_module_imports_its_own_floor_or_a_higher_one():
    assert violations(SOURCES) == []


def test_no_imports_run_in_a_circle():
    assert circles(SOURCES) == []


@pytest.mark.parametrize(
    "module, line",
    [
        ("offload_rt.memory.arena", "from offload_rt._engine import Engine"),
        ("offload_rt.memory.arena", "from offload_rt.layers import executor"),
        ("offload_rt.storage.store", "import offload_rt.storage.scratch"),
        ("offload_rt.storage.store", "def f():\n    from offload_rt.tiering.tiers import Tiers"),
        ("offload_rt.storage.store", "from .tiers import Tiers"),
        ("offload_rt.storage.store", "import importlib\nimportlib.import_module('offload_rt.tiering.tiers')"),
        ("offload_rt.checkpoint.state", "from ..engine import Engine"),
        ("planners.plans.plan", "import torch.nn"),
        ("planners.plans.plan", "def f():\n    from offload_rt.errors import ConfigError"),
        ("planners.errors", "from planners.plans.plan import Plan"),
        ("offload_rt.errors", "from offload_rt.nowhere import x"),
    ],
)
def test_an_import_that_runs_upwards_is_found(module, line):
    text, is_package = SOURCES[module]
    changed = {**SOURCES, module: (text + "\n" + line, is_package)}
    assert violations(SOURCES, [module]) == [] and violations(changed, [module]) != []


def test_a_circle_is_found():
    made_up = {"offload_rt.training.a": ("import offload_rt.training.b", False)}
    made_up["offload_rt.training.b"] = ("def f():\n    from offload_rt.training import a", False)
    assert circles(made_up) != []


def test_there_is_no_assert_and_no_print_in_the_library():
    """An `assert` vanishes under -O; a library that prints cannot be silenced. The command line may print."""
    wrong = []
    for name, (text, _) in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assert):
                wrong.append(f"{name}:{node.lineno}: assert")
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            if called and not name.startswith("offload_rt.cli"):
                wrong.append(f"{name}:{node.lineno}: print")
    assert wrong == []


def test_planners_and_the_front_door_load_without_torch():
    import subprocess
    import sys

    names = [name for name in MODULES if name.startswith("planners")]
    names += [
        "offload_rt",
        "offload_rt.errors",
        "offload_rt.config",
        "offload_rt.tensor_spec",
        "offload_rt.native",
        "offload_rt.training.run_folder",
    ]
    code = (
        f"import sys\nfor name in {names!r}: __import__(name)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
