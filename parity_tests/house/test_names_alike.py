"""What is the same in both libraries has the same name, file and signature; differences are listed.

The lists are exact: a listed name that has become alike fails, and so does one that no longer is.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import osd_jax
import osd_torch
from launch.trainer.options.groups import FLAGS
from osd_names import MOVING_BASES, OPTIMIZERS, PROJECTIONS, RESIDUALS
from parity_tests.support import ROOT

LIBRARIES = ("osd_jax", "osd_torch")

# Rooms that do the same by other means, so that most names in them differ.
OTHER_MEANS = {
    "accumulation.py": "Optax holds sketches in a state; torch in the optimizer, between backwards",
    "adam_of_rows.py": "a transformation in JAX, a `Rule` in torch",
    "aliases.py": "Optax's functions of (learning_rate, b1, b2); torch.optim's classes with groups",
    "basis_step.py": "JAX steps a tree of bases at once; torch one parameter in place",
    "composition.py": "JAX chains transformations; torch inherits from a class with groups",
    "full_rank.py": "a transformation in JAX; torch.optim's own classes, and one for bfloat16",
    "guard.py": "a `lax.cond` in JAX; torch's host decides, and hooks guard other classes",
    "llama/checkpoint.py": "Orbax saves a JAX tree; torch writes its own files",
    "llama/model.py": "Flax modules in JAX; Hugging Face's classes in torch",
    "llama/partition.py": "specs of a mesh in JAX; fully_shard in torch",
    "muon.py": "as aliases.py",
    "quantization.py": "JAX has its own; torch uses bitsandbytes",
    "rules.py": "Optax's transformations; torch's `Rule`s",
    "sharding.py": "a mesh in JAX; processes and DTensors in torch",
    "state.py": "a pytree in JAX; torch's dict of each parameter, and groups that are saved",
    "subspace.py": "a transformation in JAX; an optimizer class in torch",
}

_MESH = "placement under a mesh with Explicit axes, which torch's DTensor does by itself"
_TREE = "JAX steps whole trees; torch one parameter"
_TRACED = "JAX's arguments may be traced"
_AXES = "JAX looks axes up in trees of parameters; torch's groups give them"
_STACKS = "torch steps equal parameters as a stack; JAX's are stacked already, or vmapped"
_IN_PLACE = "torch writes in place"
_TRAINED = "a jitted step has its state outside; torch's has it in the optimizer"
# (room, library) -> why the other library has no such names there -> the names.
UNLIKE: dict[tuple[str, str], dict[str, str]] = {
    ("basis_rule.py", "osd_torch"): {
        "Optax's optimizer of P has its own learning rate": "StepSize",
        "torch saves rules by name": "name_of_rule",
    },
    ("diagnostics.py", "osd_jax"): {
        "measured in the jitted step; in torch by hooks": "Diagnostics",
        "as Diagnostics": "subspace_diagnostics",
        "a state may be wrapped anywhere in a tree": "subspace_states",
        "as subspace_states": "bases_by_key_path projected_paths",
    },
    ("layout.py", "osd_jax"): {
        _AXES: (
            "DimensionNumbers MatrixLayout matrix_layout dimension_numbers_by_path "
            "declared_vectors layouts_of"
        ),
        _TREE: "random_draws",
    },
    ("layout.py", "osd_torch"): {
        _AXES: (
            "OUTPUT_AXIS INPUT_AXIS resolve_side to_matrix Axes axes_of matrix_shape to_stack "
            "from_stack matrix_count"
        ),
        "of DTensors": "check_placement",
    },
    ("lift.py", "osd_torch"): {
        _IN_PLACE: "add_lifted_ add_ updates_of_stack",
    },
    ("llama/train.py", "osd_jax"): {
        "torch accumulates sketches layer by layer only": "ACCUMULATE",
        _TRAINED: "TrainState init_state train_state_sharding",
        "shared with the layerwise step of JAX": "skipped_metrics",
        "as skipped_metrics": "mean_factor",
        "as skipped_metrics; torch has clip_": "clipping_factor",
        "as skipped_metrics; torch has Measurement": "measured",
    },
    ("llama/train.py", "osd_torch"): {
        "a module, for DistributedDataParallel": "TokenLoss",
        "gradients are freed in the backward pass": "Measurement",
        "JAX compiles the whole step": "compiled_step set_lr",
    },
    ("llama/weights.py", "osd_torch"): {
        "checkpoints of torch share it": "hf_tensors",
        "as hf_tensors": "write_safetensors",
    },
    ("numerics.py", "osd_jax"): {
        "torch's reduces DTensors, in sharding.py": "squared_norm",
        _TRACED: "bias_correction check_static known_zero",
        _TREE: "any_of",
        _MESH: "zeros_of zeros_of_axes explicit_sharding replicated whole_columns like_sharding",
        "torch's product is `sketch.product`, of two matrices": "contract",
        "what XLA lays out": "written_transpose as_it_lies",
        "torch's groups are checked by check_objects": "check_object",
        "JAX differentiates through optimizer steps": "safe_sqrt",
    },
    ("numerics.py", "osd_torch"): {
        "JAX has no autocast": "without_autocast",
        "JAX has no default dtype": "float32_by_default",
        _STACKS: "Number per_part plus_product select_",
    },
    ("optimizers.py", "osd_jax"): {
        "for optax.inject_hyperparams": "STATIC_ARGUMENTS",
    },
    ("selection.py", "osd_torch"): {
        _AXES: "dimension_numbers_of",
    },
    ("selection.py", "osd_jax"): {
        _AXES: "Numbers Axes",
        "a layer's shapes are asked for in tracing": "of_a_part",
    },
    ("sketch.py", "osd_jax"): {
        "torch's is in sharding.py, which its sketches import": "Reduce",
        _TREE: "is_two_sided is_sketch sketches_of as_leaves bare",
        "what stands before the subspace in a chain meets it": "SketchLeaf",
        "as SketchLeaf": "is_sketch_leaf ONLY_SKETCHES",
        "a test reads it; torch's is its statistic's own": "correlation",
        "as correlation; torch's is in sharding.py": "squared_columns",
    },
    ("sketch.py", "osd_torch"): {
        "numerics.contract in JAX, of any axes": "product",
    },
    ("transport.py", "osd_jax"): {
        "torch's rules transport their own state": "Transport",
        _TREE: "is_change",
        "as Transport": "first_moment second_moment refuse_factored transport_moments",
    },
    ("transport.py", "osd_torch"): {
        "it needs both moments and the step": "second_moment_after",
        "in numerics.py in JAX, as bias_correction": "bias_corrections",
    },
}

_OPTIMIZER_CLASSES = "Optax's functions are osd_*, torch.optim's classes Subspace*"
_COMPOSED = "a transformation for Optax's chains; torch's optimizers have it as an option or method"
_PROCESSES = "processes of torch; JAX has a mesh"
# (library, name) of `__all__` -> why the other library's has no such name.
EXPORTS = {
    **{("osd_jax", f"osd_{x}"): _OPTIMIZER_CLASSES for x in ("adafactor", "lion", "muon")},
    **{("osd_jax", f"osd_{x}"): _OPTIMIZER_CLASSES for x in ("adamw", "adamw8bit")},
    **{("osd_torch", f"Subspace{x}"): _OPTIMIZER_CLASSES for x in ("Adafactor", "Lion", "Muon")},
    **{("osd_torch", f"Subspace{x}"): _OPTIMIZER_CLASSES for x in ("AdamW", "AdamW8bit")},
    ("osd_jax", "SubspaceState"): "torch's state is a dict of each parameter",
    ("osd_jax", "accumulate_sketches"): _COMPOSED,
    ("osd_jax", "in_parts"): _COMPOSED,
    ("osd_jax", "quantize_state"): _COMPOSED,
    ("osd_jax", "scale_by_adam_of_rows"): _COMPOSED,
    ("osd_jax", "scale_by_subspace"): _COMPOSED,
    ("osd_jax", "transport_moments"): _COMPOSED,
    ("osd_torch", "LayerwiseUpdates"): "hooks of the backward pass; JAX compiles a layerwise step",
    ("osd_torch", "NotCapturableError"): "JAX's steps never need the host",
    ("osd_torch", "OnlineSubspaceDescent"): "any rule of W; JAX chains it with scale_by_subspace",
    ("osd_torch", "SubspaceOptimizer"): "the base class; JAX has no classes of optimizers",
    ("osd_torch", "clip_"): "clips sketches too; Optax has clip_by_global_norm",
    ("osd_torch", "data_parallel"): _PROCESSES,
    ("osd_torch", "mean_over_processes"): _PROCESSES,
}


def public(path: Path) -> dict[str, ast.stmt]:
    """The names that a file defines and that do not begin with an underscore."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (x.id for y in targets for x in ast.walk(y) if isinstance(x, ast.Name))
            found |= dict.fromkeys(names, node)
    return {name: node for name, node in found.items() if not name.startswith("_")}


def rooms(library: str) -> set[str]:
    folder = ROOT / library
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


TWINS = sorted(rooms("osd_jax") & rooms("osd_torch"))


def names_of(room: str) -> tuple[set[str], set[str]]:
    first, second = (set(public(ROOT / library / room)) for library in LIBRARIES)
    return first, second


def test_public_names_of_twin_rooms_are_alike_but_for_the_list() -> None:
    assert len(TWINS) > 25
    unlike = set()
    for room in set(TWINS) - OTHER_MEANS.keys():
        first, second = names_of(room)
        unlike |= {(room, "osd_jax", name) for name in first - second}
        unlike |= {(room, "osd_torch", name) for name in second - first}
    listed = {
        (room, library, name)
        for (room, library), reasons in UNLIKE.items()
        for names in reasons.values()
        for name in names.split()
    }
    assert sorted(unlike ^ listed) == []


@pytest.mark.parametrize("room", OTHER_MEANS)
def test_a_room_of_other_means_is_one(room: str) -> None:
    """A room whose names are mostly alike belongs in the list of names."""
    first, second = names_of(room)
    assert len(first & second) <= min(len(first - second), len(second - first))


def test_what_the_libraries_export_is_alike_but_for_the_list() -> None:
    first, second = set(osd_jax.__all__), set(osd_torch.__all__)
    unlike = {("osd_jax", name) for name in first - second}
    unlike |= {("osd_torch", name) for name in second - first}
    assert sorted(unlike - EXPORTS.keys()) == []
    assert sorted(EXPORTS.keys() - unlike) == []


def parameters(node: ast.FunctionDef) -> list[str]:
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    alike = {"tensor": "array"}  # what each framework calls it
    return [alike.get(x.arg, x.arg) for x in arguments]


# Functions of one name, in rooms that are alike, with other parameters.
SIGNATURES = {
    ("bases.py", "each_matrix"): "JAX has stacks and recomputes some members only",
    ("bases.py", "leading_singular_vectors"): "in torch it is svd's `fresh` itself",
    ("bases.py", "oja"): "Optax's optimizer of P has its own learning rate",
    ("bases.py", "online_pca"): "as oja, and its own weight decay",
    ("diagnostics.py", "projectors"): "of a state in JAX, of the optimizer in torch",
    ("lift.py", "lift"): "XLA is told how the product lies",
    ("lift.py", "lifted_update"): "JAX's parameters have any axes",
    ("llama/train.py", "make_eval_step"): _TRAINED,
    ("llama/train.py", "make_train_step"): _TRAINED,
    ("llama/train.py", "sample"): _TRAINED,
    ("llama/weights.py", "load_hf"): "a tree of arrays in JAX, a model in torch",
    ("llama/weights.py", "save_hf"): "as load_hf",
    ("numerics.py", "has_direction"): "torch's number is on the host, without its dtype",
    ("numerics.py", "random_bits"): "JAX's bits are those of a part of a sharded array",
    ("optimizers.py", "make_optimizer"): "schedules are inside in JAX, around it in torch",
    ("published.py", "published_basis"): "as oja; and JAX can set P by a QR",
    ("selection.py", "say_what_is_projected"): "shapes in JAX, parameters in torch",
    ("sketch.py", "make_sketch"): "torch knows some statistics on the host already",
    ("transport.py", "change_of"): "torch's moments lie as the weight does",
}


def test_functions_of_one_name_have_one_signature_but_for_the_list() -> None:
    unlike = set()
    for room in set(TWINS) - OTHER_MEANS.keys():
        first, second = (public(ROOT / library / room) for library in LIBRARIES)
        for name in first.keys() & second.keys():
            one, other = first[name], second[name]
            if isinstance(one, ast.FunctionDef) and isinstance(other, ast.FunctionDef):
                unlike |= {(room, name)} if parameters(one) != parameters(other) else set()
    assert sorted(unlike - SIGNATURES.keys()) == []
    assert sorted(SIGNATURES.keys() - unlike) == []


# Where names stand beside osd_names.py, as keys of a library's objects.
TABLES = {"osd_jax/published.py", "osd_torch/published.py"}
KINDS = {"optimizer": set(OPTIMIZERS), "proj_type": set(PROJECTIONS), "residual": set(RESIDUALS)}


def lists_of_names(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Literal collections with three or more published names of a kind, and nothing else."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        values = [x.value for x in items if isinstance(x, ast.Constant)]
        if len(values) == len(items) >= 3 and all(isinstance(x, str) for x in values):
            for kind, names in KINDS.items():
                if set(values) <= names:
                    yield kind, values


def test_each_published_name_stands_in_one_table() -> None:
    paths = [path for name in (*LIBRARIES, "launch") for path in (ROOT / name).rglob("*.py")]
    found = {
        path.relative_to(ROOT).as_posix(): lists
        for path in paths
        if (lists := [*lists_of_names(path)])
    }
    assert {path: names for path, names in found.items() if path not in TABLES} == {}
    for library in (osd_jax, osd_torch):
        published = __import__(f"{library.__name__}.published", fromlist=["published"])
        rules = {x.rule for x in PROJECTIONS.values() if x.rule}
        assert published.PROJECTOR_RULES.keys() == rules
        bases = {x.basis for x in PROJECTIONS.values()}
        assert published.REFRESHED.keys() == bases - {*MOVING_BASES}
        assert published.RESIDUAL_LIFTS.keys() == RESIDUALS.keys()


# Defaults of the libraries and of the trainers' flags that differ, and why.
DEFAULTS = {
    "update_proj_gap": (200, 50, "as in the published commands, and as in the published script"),
    "beta1": (None, 0.0, "the rule's own, and the published script's flag, where 0 is the same"),
    "basis_dtype": (None, "float32", "the same for trainers' weights; None is float64 for float64"),
}


def test_defaults_of_libraries_and_trainers_are_alike_but_for_the_list() -> None:
    flags = {name: flag.default for name, flag in FLAGS.items()}
    for make in (osd_jax.make_optimizer, osd_torch.make_optimizer):
        own = {x.name: x.default for x in inspect.signature(make).parameters.values()}
        unlike = {
            name: (default, flags[name])
            for name, default in own.items()
            if name in flags and default is not inspect.Parameter.empty and default != flags[name]
        }
        assert unlike == {name: x[:2] for name, x in DEFAULTS.items()}
