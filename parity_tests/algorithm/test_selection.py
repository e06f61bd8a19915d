"""Which parameters are projected by default and by `select_linear`, and the log messages."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import optax
import pytest
import torch
import torch.distributed as dist
import transformers
from flax import nnx
from torch import Tensor

import osd_jax
import osd_torch
from osd_jax import llama as jax_llama
from osd_jax import selection as jax_selection
from osd_jax.llama.layer_state import state_of_part
from osd_torch import selection as torch_selection
from osd_torch.selection import ARRAY, EXPERTS, HEAD, MATRIX, ROUTER, TABLE, VECTOR

WIDTH = 32
LLAMA = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**LLAMA, "num_key_value_heads": 2}
EXPERTS_OF = {**GROUPED, "moe_intermediate_size": 24, "num_experts": 4}
ENCODERS = {
    "vocab_size": 64,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
T5 = {"vocab_size": 64, "d_model": WIDTH, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
BLOOM = {"vocab_size": 64, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4}
GPT2 = {"vocab_size": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 32}
VISION = {**LLAMA, "image_size": 16, "patch_size": 8}
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
GEMMA3N = {
    **GROUPED,
    "head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0, 0.0],
}

# The rest of the class's name, its config's options, and the ends of the names of 2-D parameters
# that are left inside the blocks.
ALL: tuple[str, ...] = ()
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "Llama": ("ForCausalLM", GROUPED, ALL),
    "Mixtral": ("ForCausalLM", {**GROUPED, "num_local_experts": 4}, ("mlp.gate.weight",)),
    "Qwen3Moe": ("ForCausalLM", {**EXPERTS_OF, "head_dim": 8}, ("mlp.gate.weight",)),
    "Qwen2Moe": (
        "ForCausalLM",
        {**EXPERTS_OF, "shared_expert_intermediate_size": 16},
        ("mlp.gate.weight", "shared_expert_gate.weight"),
    ),
    "GptOss": (
        "ForCausalLM",
        {**GROUPED, "num_local_experts": 4, "head_dim": 8},
        ("router.weight", "proj_bias"),
    ),
    "DeepseekV3": ("ForCausalLM", DEEPSEEK, ("mlp.gate.weight",)),
    "Olmoe": ("ForCausalLM", {**LLAMA, "num_experts": 4}, ("mlp.gate.weight",)),
    "GPT2": ("LMHeadModel", GPT2, ALL),
    "GPTNeoX": ("ForCausalLM", LLAMA, ALL),
    "OPT": (
        "ForCausalLM",
        {
            "vocab_size": 64,
            "hidden_size": WIDTH,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": WIDTH,
        },
        ALL,
    ),
    "Bert": ("ForMaskedLM", LLAMA, ALL),
    "Roberta": ("ForSequenceClassification", LLAMA, ALL),
    "DebertaV2": (
        "ForSequenceClassification",
        {**LLAMA, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        ALL,
    ),
    "T5": ("ForConditionalGeneration", T5, ("relative_attention_bias.weight",)),
    "SwitchTransformers": (
        "ForConditionalGeneration",
        {**T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        ("relative_attention_bias.weight", "router.classifier.weight"),
    ),
    "Bart": ("ForConditionalGeneration", ENCODERS, ALL),
    "Whisper": (
        "ForConditionalGeneration",
        {**ENCODERS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        ALL,
    ),
    "ViT": ("ForImageClassification", VISION, ALL),
    "Swin": (
        "ForImageClassification",
        {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]},
        ("relative_position_bias_table",),
    ),
    "Mamba": (
        "ForCausalLM",
        {"vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": 2},
        ("A_log",),
    ),
    "Rwkv": (
        "ForCausalLM",
        {"vocab_size": 64, "hidden_size": WIDTH, "num_hidden_layers": 2},
        ALL,
    ),
    "Falcon": ("ForCausalLM", LLAMA, ALL),
    "Bloom": ("ForCausalLM", BLOOM, ALL),
    "Phi3": ("ForCausalLM", {**LLAMA, "pad_token_id": 0}, ALL),
    "Gemma3": ("ForCausalLM", {**GROUPED, "head_dim": 8}, ALL),
    "Gemma3n": ("ForCausalLM", GEMMA3N, ("modality_router.weight",)),
    "XLNet": (
        "LMHeadModel",
        {"vocab_size": 64, "d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 48},
        ("r_r_bias", "r_s_bias", "r_w_bias"),
    ),
}
CONFIGS = {
    "Gemma3": "Gemma3TextConfig",
    "Gemma3n": "Gemma3nTextConfig",
}
STACKS = {"Mixtral", "Qwen3Moe", "Qwen2Moe", "GptOss", "DeepseekV3", "Olmoe", "XLNet"}


@functools.cache
def build(name: str) -> torch.nn.Module:
    if name == "nn.TransformerEncoder":
        layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True)
        return torch.nn.TransformerEncoder(layer, 2)
    suffix, options, _ = MODELS[name]
    config = getattr(transformers, CONFIGS.get(name, f"{name}Config"))(**options)
    with torch.device("meta"):
        return getattr(transformers, name + suffix)(config)


def embeddings_and_head(model: torch.nn.Module) -> set[int]:
    """The ids of the weights of embeddings, and of what is on top of the base model."""
    modules = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    found = {id(module.weight) for module in modules}
    base = getattr(model, "base_model", model)
    inside = {id(param) for param in base.parameters()}
    return found | {id(param) for param in model.parameters() if id(param) not in inside}


def chosen_by_default(params: dict[str, Any], of: Any = torch_selection) -> set[str]:
    kinds = of.Kinds(params)
    return {name for name, param in params.items() if kinds.selects(name, param)}


NAMES = [*MODELS, "nn.TransformerEncoder"]


@pytest.mark.parametrize("name", NAMES)
def test_all_matrices_inside_the_blocks_and_nothing_else(name: str) -> None:
    model = build(name)
    params = dict(model.named_parameters())
    outside = embeddings_and_head(model)
    left_in_blocks = MODELS[name][2] if name in MODELS else ALL
    expected = {
        key
        for key, param in params.items()
        if (param.ndim == 2 or ".experts." in key and param.ndim == 3)
        and any(part.isdigit() for part in key.split("."))
        and id(param) not in outside
        and not key.endswith(left_in_blocks or ("none",))
    }
    expected -= {key for key in expected if key.startswith("model.altup_")}  # a list, not blocks
    assert len(expected) >= 4
    assert chosen_by_default(params) == expected
    for end in left_in_blocks:
        assert any(key.endswith(end) for key in params), end


@pytest.mark.parametrize("name", NAMES)
def test_jax_chooses_the_same_by_the_same_names(name: str) -> None:
    params = dict(build(name).named_parameters())
    tree: dict[str, Any] = {}
    for key, param in params.items():
        *path, leaf = key.split(".")
        node = functools.reduce(lambda at, part: at.setdefault(part, {}), path, tree)
        node[leaf] = jax.ShapeDtypeStruct(param.shape, jnp.float32)
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    # Only PyTorch's default finds the axes of experts.
    matrices = {key: param for key, param in params.items() if param.ndim == 2}
    expected = {key.replace(".", "/") for key in chosen_by_default(params) & matrices.keys()}
    assert chosen_by_default(named, jax_selection) == expected


def test_both_libraries_tell_by_the_same_words() -> None:
    ours, theirs = vars(torch_selection), vars(jax_selection)
    words = [name for name in ours if name.isupper() and name not in ("REASONS", "_ROUTER_CLASS")]
    assert len(words) > 15
    assert {name: ours[name] for name in words} == {name: theirs[name] for name in words}


def by_attention_or_mlp(name: str, param: Any) -> bool:
    """What the default selection was before it knew blocks."""
    return len(param.shape) == 2 and any(part in name for part in ("attn", "attention", "mlp"))


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Falcon", "Bloom", "Phi3", "ViT"])
def test_where_attention_and_mlp_were_all_nothing_changes(name: str) -> None:
    params = dict(build(name).named_parameters())
    expected = {key for key, param in params.items() if by_attention_or_mlp(key, param)}
    assert chosen_by_default(params) == expected


def test_the_choice_for_the_flax_llama_is_its_own() -> None:
    config = jax_llama.LlamaConfig(
        64, 16, 24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    params = jax.eval_shape(lambda: jax_llama.init(config, 0))
    tx = osd_jax.make_optimizer(
        "galore_adamw",
        "continuous",
        learning_rate=0.1,
        rank=4,
        dimension_numbers=jax_llama.dimension_numbers,
    )
    state = jax.eval_shape(tx.init, params)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    expected = {path for path, x in named.items() if jax_llama.is_projected(path, x)}
    expected -= {"layers/attention_norm", "layers/mlp_norm"}
    assert len(expected) == 7
    assert set(osd_jax.projectors(state)) == expected


KINDS: list[tuple[str, tuple[int, ...], str]] = [
    # What stays as it was: attention and MLP without a block.
    ("mlp", (4, 6), MATRIX),
    ("attn.weight", (4, 6), MATRIX),
    ("layer.mlp.kernel", (4, 6), MATRIX),
    ("vision_model.head.attention.in_proj_weight", (12, 4), MATRIX),
    ("vision_model.head.mlp.fc1.weight", (6, 4), MATRIX),
    # Numbered blocks, as PyTorch and Flax name them.
    ("transformer.h.3.ff.c_fc.weight", (4, 6), MATRIX),
    ("net.0.fc.weight", (4, 6), MATRIX),
    ("layers.0.weight", (4, 6), MATRIX),
    ("params/layers_0/Dense_0/kernel", (4, 6), MATRIX),
    ("params/Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel", (4, 6), MATRIX),
    ("block_3/w1", (4, 6), MATRIX),
    ("layer0/kernel", (4, 6), MATRIX),
    ("blocks/0/fc/kernel/value", (4, 6), MATRIX),
    ("encoder.layer.0.layer_norm_proj.weight", (4, 6), MATRIX),
    # Within a block, what is named like a head or a gate and is none.
    ("blocks.0.sa.heads.1.key.weight", (4, 6), MATRIX),
    ("model.layers.0.feed_forward.gate.weight", (6, 4), MATRIX),
    ("model.layers.0.ff.w_gate.weight", (6, 4), MATRIX),
    ("layers.0.attention.self.pos_key_proj.weight", (4, 6), MATRIX),
    ("layers.0.self_attn.linear_pos.weight", (4, 6), MATRIX),
    ("classifier.encoder.layer.0.fc.weight", (4, 6), MATRIX),
    ("base_model.model.model.layers.0.q_proj.lora_A.default.weight", (2, 6), MATRIX),
    # A number that may stand for an embedding or a head; a model's name that ends with one.
    ("0.weight", (4, 6), torch_selection.OUTSIDE),
    ("net.2.weight", (4, 6), torch_selection.OUTSIDE),
    ("wav2vec2.feature_projection.projection.weight", (4, 6), torch_selection.OUTSIDE),
    ("params/Dense_0/kernel", (4, 6), torch_selection.OUTSIDE),
    ("params/Embed_0/embedding", (4, 6), TABLE),
    # Tables and states inside blocks.
    ("blocks.0.attn.rel_pos_h", (7, 4), TABLE),
    ("layers.0.attn.relative_position_bias_table", (7, 4), TABLE),
    ("layer.0.attention.self.distance_embedding.weight", (7, 4), TABLE),
    ("backbone.layers.0.mixer.A_log", (8, 4), TABLE),
    ("blocks.0.attention.time_faaaa", (8, 4), TABLE),
    ("encoder/layers_0/attention/relative_bias/rel_embedding", (8, 4), TABLE),
    # Heads.
    ("mlp_head.1.weight", (4, 6), HEAD),
    ("lm_head.weight", (4, 6), HEAD),
    ("classification_heads.0.dense.weight", (4, 6), HEAD),
    ("bbox_predictor.layers.0.weight", (4, 6), HEAD),
    ("model.layers.61.shared_head.head.weight", (4, 6), HEAD),
    ("cls.predictions.transform.dense.weight", (4, 6), HEAD),
    ("qa_outputs.weight", (2, 6), HEAD),
    # Routers.
    ("model.layers.0.mlp.router.weight", (2, 6), ROUTER),
    ("model.layers.0.block_sparse_moe.gate.weight", (2, 6), ROUTER),
    ("params/layers_0/MoeBlock_0/gate/kernel", (6, 2), ROUTER),
    ("model.layers.0.mlp.shared_expert_gate.weight", (1, 6), ROUTER),
    # Vectors and stacks.
    ("blocks.0.attention.time_mix_key", (1, 1, 6), VECTOR),
    ("layers.0.self_attn.pos_bias_u", (2, 6), VECTOR),
    ("layers_0/attention/query/bias", (2, 6), VECTOR),
    ("layers/attention_norm", (2, 6), VECTOR),
    ("layers.0.mlp.experts.gate_up_proj", (3, 4, 6), EXPERTS),
    ("layers_0/attention/query/kernel", (4, 2, 6), ARRAY),
    ("layers.0.mixer.conv1d.weight", (6, 1, 4), torch_selection.CONVOLUTION),
]


@pytest.mark.parametrize(("name", "shape", "kind"), KINDS, ids=[x[0] for x in KINDS])
@pytest.mark.parametrize("library", [torch_selection, jax_selection], ids=["torch", "jax"])
def test_kinds_by_name(library: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    assert library.Kinds([name])(name, shape) == kind


def test_a_gate_is_a_router_beside_experts_only() -> None:
    names = ["layers.0.ff.gate.weight", "layers.0.ff.up.weight", "layers.1.ff.gate.weight"]
    kinds = torch_selection.Kinds([*names, "layers.1.ff.experts.up"])
    assert [kinds(name, (4, 6)) for name in names] == [MATRIX, MATRIX, ROUTER]
    # The gates of a stack of experts have a router next to them.
    names = ["layers/0/moe/gate", "layers/0/moe/up", "layers/0/moe/router"]
    kinds = jax_selection.Kinds(names)
    assert [kinds(name, (3, 4, 6)) for name in names] == [EXPERTS, EXPERTS, ROUTER]


def test_experts_and_attention_go_in_where_dimension_numbers_say_so() -> None:
    params = {
        "layers": [
            {
                "query": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))},
                "moe": {"experts": jnp.ones((3, 8, 12)), "router": jnp.ones((8, 3))},
                "conv": jnp.ones((3, 8, 8)),
            }
        ]
    }
    matrix = osd_jax.SubspaceDimensionNumbers
    numbers = {
        "layers": [
            {
                "query": {"kernel": matrix(0, (1, 2)), "bias": None},
                "moe": {"experts": matrix(1, 2), "router": None},
                "conv": None,
            }
        ]
    }
    options = {"learning_rate": 0.1, "rank": 4}
    tx = osd_jax.make_optimizer("galore_adamw", "continuous", dimension_numbers=numbers, **options)
    found = set(osd_jax.projectors(tx.init(params)))
    assert found == {"layers/0/query/kernel", "layers/0/moe/experts"}


# ------------------------------------------------------------------------------- by the modules


@pytest.mark.parametrize("name", NAMES)
def test_select_linear_takes_every_linear_layer_but_heads_and_routers(name: str) -> None:
    model = build(name)
    select = osd_torch.select_linear(model)
    params = dict(model.named_parameters())
    chosen = {key for key, param in params.items() if select(key, param)}
    more = chosen - chosen_by_default(params)
    assert chosen_by_default(params) <= chosen
    # Linear layers outside the blocks, which names do not tell from heads.
    assert all("project" in key for key in more), more
    owners = {id(m.weight): m for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert all(id(params[key]) in owners for key in more)
    assert not {id(params[key]) for key in chosen} & embeddings_and_head(model)


class Odd(torch.nn.Module):
    """Uninformative names; a tied head; a router of a custom class."""

    class TopRouter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.way = torch.nn.Linear(WIDTH, 4)

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Embedding(64, WIDTH)
        self.b = torch.nn.Linear(WIDTH, 48)
        self.c = torch.nn.Linear(WIDTH, 64)
        self.c.weight = self.a.weight
        self.d = torch.nn.MultiheadAttention(WIDTH, 4, kdim=16, vdim=16)
        self.e = self.TopRouter()
        self.f = torch.nn.Linear(WIDTH, 64)
        self.g = torch.nn.Conv1d(WIDTH, WIDTH, 3)
        self.h = transformers.pytorch_utils.Conv1D(48, WIDTH)
        self.i = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(WIDTH, WIDTH))

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.f

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x)


ODD = {
    "b.weight",
    "d.q_proj_weight",
    "d.k_proj_weight",
    "d.v_proj_weight",
    "d.out_proj.weight",
    "h.weight",
    "i.parametrizations.weight.original",
}


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_select_linear_by_identity_in_wrappers(one_process: None) -> None:
    model = Odd()
    select = osd_torch.select_linear(model)
    chosen = lambda select, model: {k for k, p in model.named_parameters() if select(k, p)}
    assert chosen(select, model) == ODD
    for wrapped in (torch.nn.parallel.DistributedDataParallel(model), torch.compile(model)):
        found = chosen(osd_torch.select_linear(wrapped), wrapped)
        assert {key.split(".", 1)[1] for key in found} == ODD
        assert chosen(select, wrapped) == found  # made for the model, asked about the wrapper
    with pytest.raises(ValueError, match="'x' does not belong to the model given to select_linear"):
        select("x", torch.nn.Parameter(torch.ones(2, 2)))
    with pytest.raises(ValueError, match="model is a dict: expected a torch.nn.Module"):
        osd_torch.select_linear(dict(model.named_parameters()))  # type: ignore[arg-type]


def test_select_linear_of_a_model_that_is_sharded_afterwards(one_process: None) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8))
    before = osd_torch.select_linear(model)
    torch.distributed.fsdp.fully_shard(model)
    for select in (before, osd_torch.select_linear(model)):
        found = [name for name, param in model.named_parameters() if select(name, param)]
        assert found == ["1.weight"]


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attend = nnx.MultiHeadAttention(2, WIDTH, rngs=rngs, decode=False)
        self.down = nnx.LoRALinear(WIDTH, 16, lora_rank=2, rngs=rngs)
        self.mix = nnx.Einsum("...ab,acd->...cdb", (2, 3, 4), rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs)
        self.router = nnx.Linear(WIDTH, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table = nnx.Embed(64, WIDTH, rngs=rngs)
        self.parts = nnx.List([Block(rngs)])
        self.again = self.parts[0].down
        self.tied = nnx.Linear(64, WIDTH, rngs=rngs)
        self.tied.kernel = self.table.embedding
        make = nnx.vmap(lambda key: nnx.Linear(WIDTH, 8, rngs=key))
        self.deep = make(rngs.split(3))
        self.lm_head = nnx.Linear(WIDTH, 64, rngs=rngs)


# P's shape at rank 4, on the shorter side.
NET = {
    "again/kernel": (16, 4),
    "again/lora/lora_a": (2, 2),
    "again/lora/lora_b": (2, 2),
    "parts/0/attend/query/kernel": (WIDTH, 4),
    "parts/0/attend/key/kernel": (WIDTH, 4),
    "parts/0/attend/value/kernel": (WIDTH, 4),
    "parts/0/attend/out/kernel": (WIDTH, 4),
    "parts/0/mix/kernel": (2, 2),
    "deep/kernel": (3, 8, 4),
}


def test_select_linear_of_flax_by_path_with_its_axes() -> None:
    model = Net(nnx.Rngs(0))
    select = osd_jax.select_linear(model)
    options = {"learning_rate": 0.1, "rank": 4, "select": select}
    tx = osd_jax.make_optimizer("galore_adamw", "continuous", **options)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = jax.eval_shape(tx.init, params)
    found = osd_jax.projectors(state)
    assert {path: basis.shape for path, basis in found.items()} == NET
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    # The leaves of nnx.State itself, whose paths end with the attribute of the array.
    leaves = jax.tree_util.tree_flatten_with_path(nnx.state(model))[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    chosen = {name for name, (_, x) in zip(names, leaves, strict=True) if select(name, x)}
    assert {name.removesuffix("/value") for name in chosen} == set(NET)

    with pytest.raises(ValueError, match="'x' does not belong to the model given to select_linear"):
        tx.init({"x": jnp.ones((4, 6))})
    with pytest.raises(ValueError, match="model is a dict: expected a flax.nnx.Module"):
        osd_jax.select_linear(params)


def test_flax_linen_by_default() -> None:
    class EncoderBlock(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.Dense(WIDTH)(linen.LayerNorm()(linen.Dense(48)(x)))

    class Classifier(linen.Module):
        @linen.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            x = linen.Embed(64, WIDTH)(tokens)
            for _ in range(2):
                x = EncoderBlock()(x)
            return linen.Dense(3)(x)

    tokens = jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(Classifier().init, jax.random.key(0), tokens)
    tx = osd_jax.make_optimizer("galore_adamw", "continuous", learning_rate=0.1, rank=4)
    assert set(osd_jax.projectors(jax.eval_shape(tx.init, params))) == {
        f"params/EncoderBlock_{block}/Dense_{layer}/kernel" for block in (0, 1) for layer in (0, 1)
    }


# ----------------------------------------------------------------------------------- messages


def make_torch(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    return osd_torch.make_optimizer(
        model.named_parameters(), "galore_adamw", "continuous", lr=0.1, rank=8, **options
    )


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_torch_says_once_what_is_projected(caplog: pytest.LogCaptureFixture) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    with caplog.at_level(logging.INFO, "osd_torch"):
        optimizer = make_torch(model)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.step()
    total = sum(param.numel() for param in model.parameters())
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    (said,) = [line for line in lines(caplog, logging.INFO) if "subspaces of rank" in line]
    assert said == (
        f"14 matrices in subspaces of rank 8: {100 * matrices / total:.3g} % of {total:,} "
        "parameters, 100 % of those in linear maps inside the blocks. At full rank: 1 embedding or "
        "table (2,048 parameters), 1 head (2,048 parameters), 5 vectors (160 parameters)"
    )


@pytest.mark.parametrize("name", sorted(STACKS))
def test_torch_says_what_it_does_with_stacks(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """It projects experts, and warns of arrays whose axes it does not know."""
    suffix, options, _ = MODELS[name]
    model = getattr(transformers, name + suffix)(getattr(transformers, f"{name}Config")(**options))
    stacks = [p for k, p in model.named_parameters() if p.ndim == 3 and "seg_embed" not in k]
    stacks = [p for p in stacks if min(p.shape) > 1]
    left = sum(param.numel() for param in stacks)
    of_experts = name != "XLNet"
    with caplog.at_level(logging.INFO, "osd_torch"):
        make_torch(model)
    level = logging.INFO if of_experts else logging.WARNING
    (said,) = [line for line in lines(caplog, level) if "subspaces of rank" in line]
    if of_experts:
        assert f"and {len(stacks)} stacks of experts in subspaces of rank" in said
        assert "100 % of those in linear maps inside the blocks" in said
    else:
        arrays = f"{len(stacks)} arrays of three or more axes ({left:,} parameters, such as"
        assert f"At full rank: {arrays}" in said and "in dimension_numbers=" in said
    caplog.clear()
    make_torch(model, select=osd_torch.select_linear(model))
    assert of_experts or f"{len(stacks)} arrays" in lines(caplog, logging.WARNING)[0]
    caplog.clear()
    make_torch(model, select=by_attention_or_mlp)  # the user's own choice
    assert not lines(caplog, logging.WARNING)


def test_torch_says_how_many_are_no_wider_than_the_rank(caplog: pytest.LogCaptureFixture) -> None:
    shapes = {"layers.0.lora_A.weight": (4, 32), "layers.0.lora_B.weight": (32, 4)}
    shapes["layers.0.fc.weight"] = (32, 32)
    named = [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    with caplog.at_level(logging.INFO, "osd_torch"):
        osd_torch.make_optimizer(named, "galore_adamw", lr=0.1, rank=8)
    (said,) = lines(caplog, logging.INFO)
    assert "3 matrices in subspaces of rank 8: 100 %" in said
    assert "2 of them no wider than the rank, where P saves nothing" in said


def test_jax_says_once_what_is_projected(caplog: pytest.LogCaptureFixture) -> None:
    params = {
        "embed": jnp.ones((10, 8)),
        "layers_0": {"fc": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}},
    }
    tx = osd_jax.make_optimizer("galore_adamw", "continuous", learning_rate=0.1, rank=4)
    with caplog.at_level(logging.INFO, "osd_jax"):
        jax.eval_shape(tx.init, params)
        state = jax.jit(tx.init)(params)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(params, state, params)
            params = optax.apply_updates(params, updates)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "osd_jax"]
    assert said == (
        f"1 matrix in subspaces of rank 4: {100 * 48 / 134:.3g} % of 134 parameters, 100 % of "
        "those in linear maps inside the blocks. At full rank: 1 embedding or table (80 "
        "parameters), 1 vector (6 parameters)"
    )
    other = {"layers_0": {"fc": jnp.ones((8, 6)), "experts": jnp.ones((3, 8, 6))}}
    tx.init(other)
    (said,) = lines(caplog, logging.WARNING)
    assert (
        "25 % of those in linear maps inside the blocks. At full rank: 1 stack of experts" in said
    )
    assert "'layers_0/experts' (3, 8, 6): give the axes of their matrices" in said
    caplog.clear()
    only = lambda path, x: path.endswith("fc")
    numbers = {"layers_0": {"fc": osd_jax.SubspaceDimensionNumbers()}}  # of what is selected
    options = {"learning_rate": 0.1, "rank": 4, "select": only, "dimension_numbers": numbers}
    osd_jax.make_optimizer("galore_adamw", "continuous", **options).init(other)
    assert not lines(caplog, logging.WARNING)


def test_a_part_of_the_parameters_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    params = {"layers_0": {"fc": jnp.ones((8, 6))}, "layers_1": {"fc": jnp.ones((8, 6))}}
    tx = osd_jax.make_optimizer("galore_adamw", learning_rate=0.1, rank=4)
    with caplog.at_level(logging.INFO, "osd_jax"):
        state = jax.eval_shape(tx.init, params)
        for name in params:
            state_of_part(tx, {name: params[name]}, state)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "osd_jax"]
    assert said.startswith("2 matrices")


def test_only_the_first_process_says_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(torch_selection, "is_first_process", lambda: False)
    with caplog.at_level(logging.INFO):
        make_torch(torch.nn.ModuleDict({"mlp": torch.nn.Linear(12, 16)}))
        tx = osd_jax.make_optimizer("galore_adamw", "continuous", learning_rate=0.1, rank=4)
        tx.init({"mlp": jnp.ones((8, 6)), "layers_0": {"experts": jnp.ones((2, 8, 6))}})
    assert not [r for r in caplog.records if r.name in ("osd_jax", "osd_torch")]


def test_nothing_projected_still_warns() -> None:
    with pytest.warns(UserWarning, match="none of the 2 parameters is projected"):
        make_torch(torch.nn.Linear(4, 6))
    tx = osd_jax.make_optimizer("galore_adamw", "continuous", learning_rate=0.1, rank=4)
    with pytest.warns(UserWarning, match="none of the 1 parameters is projected"):
        tx.init({"Dense_0": jnp.ones((4, 6))})


def test_a_warning_is_seen_without_any_set_up(
    capsys: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "osd_torch")  # the default, whatever a trainer has set
    monkeypatch.setattr(logging.root, "handlers", [])
    shapes = {"layers.0.fc.weight": (8, 6), "layers.0.up": (2, 8, 6)}
    named = [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    osd_torch.make_optimizer(named, "galore_adamw", lr=0.1, rank=4)
    assert "33.3 % of those in linear maps inside the blocks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("text_embedder.encoder.layer.0.attention.query.weight", "matrix"),
        ("embedding_model.layers.0.self_attn.q_proj.weight", "matrix"),
        ("stable_cascade.blocks.0.attn.to_q.weight", "matrix"),
        ("text_embedder.mlp.weight", "matrix"),
        ("embeddings.word_embeddings.weight", "embedding or table"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
         "embedding or table"),
        ("layers.0.attn.relative_position_bias_table", "embedding or table"),
    ],
)  # fmt: skip
def test_what_blocks_stand_in_makes_no_tables_of_their_matrices(name: str, kind: str) -> None:
    path = name.replace(".", "/")
    assert osd_torch.selection.Kinds([name])(name, (8, 8)) == kind
    assert osd_jax.selection.Kinds([path])(path, (8, 8)) == kind
