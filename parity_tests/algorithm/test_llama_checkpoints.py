"""Checkpoints of Llama 3 and TinyLlama in both libraries: configs, logits and files.

The configs are those of the published models, written by hand; the weights are random.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import osd_jax
from osd_jax import llama as jax_llama
from osd_jax import sharding
from osd_jax.llama import weights as jax_weights
from osd_jax.llama.layerwise import make_layerwise_train_step
from osd_jax.llama.partition import partition_specs
from osd_jax.llama.train import init_state, make_train_step
from osd_torch import llama as torch_llama

transformers = pytest.importorskip("transformers")

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
LLAMA_3: dict[str, Any] = LLAMA | {
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "rope_scaling": None,
    "rope_theta": 500000.0,
}
SCALING: dict[str, Any] = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_1: dict[str, Any] = LLAMA_3 | {
    "max_position_embeddings": 131072,
    "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": SCALING,
}
LLAMA_3_2: dict[str, Any] = LLAMA_3_1 | {
    "tie_word_embeddings": True,
    "rope_scaling": SCALING | {"factor": 32.0},
    "intermediate_size": 8192,
}
MODELS: dict[str, tuple[dict[str, Any], int]] = {  # with the number of weights
    "Llama-3-8B": (LLAMA_3, 8_030_261_248),
    "Llama-3.1-8B": (LLAMA_3_1, 8_030_261_248),
    "Llama-3.2-1B": (
        LLAMA_3_2 | {"hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64},
        1_235_814_400,
    ),
    "Llama-3.2-3B": (
        LLAMA_3_2
        | {
            "hidden_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "head_dim": 128,
        },
        3_212_749_824,
    ),
    "Llama-3.3-70B": (
        LLAMA_3_1
        | {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "head_dim": 128,
        },
        70_553_706_496,
    ),
    "TinyLlama-1.1B": (
        LLAMA
        | {
            "vocab_size": 32000,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "pretraining_tp": 1,
            "rope_scaling": None,
        },
        1_100_048_384,
    ),
}
SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,  # attention far from uniform
}
# Of 40 tokens, so that positions reach beyond those of pretraining.
SHAPED: dict[str, dict[str, Any]] = {
    "Llama-3.2": LLAMA_3_2
    | SMALL
    | {
        "num_key_value_heads": 2,
        "rope_theta": 1000.0,
        "rope_scaling": SCALING | {"original_max_position_embeddings": 16},
    },
    "TinyLlama": MODELS["TinyLlama-1.1B"][0] | SMALL | {"num_key_value_heads": 1},
    "linear, with biases": LLAMA
    | SMALL
    | {
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        "attention_bias": True,
        "mlp_bias": True,
    },
}
TOKENS = np.random.default_rng(0).integers(0, 101, (2, 40)).astype(np.int32)
BIASED = "linear, with biases"


@pytest.mark.parametrize("name", MODELS)
def test_configs_by_name(name: str) -> None:
    values, count = MODELS[name]
    config = jax_llama.LlamaConfig.from_hf_dict(values)
    assert jax_llama.num_parameters(config) == count
    assert jax_llama.LlamaConfig.from_hf_dict(config.to_hf_dict()) == config
    theirs = torch_llama.config_from_dict(values)
    again = torch_llama.config_from_dict(json.loads(json.dumps(config.to_hf_dict())))
    assert torch_llama.compared(again) == torch_llama.compared(theirs)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(theirs)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.fixture(scope="module", params=SHAPED)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Transformers' model with random weights, and its folder: several files and their index."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPED[request.param]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return model.eval(), folder, *jax_llama.load_hf(folder)


def test_logits_equal_those_of_transformers(made: Any) -> None:
    model, folder, config, params = made
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.no_grad():
        theirs = model(tokens).logits.numpy()
        ours = torch_llama.load_hf(folder)(tokens).logits.numpy()
    assert np.abs(theirs).max() > 1
    assert np.array_equal(ours, theirs)
    logits = jax.jit(jax_llama.forward, static_argnums=1)(params, config, TOKENS)
    assert np.abs(logits - theirs).max() <= 1e-4


@pytest.mark.parametrize("made", [BIASED], indirect=True)
def test_gradients_with_biases_equal_those_of_transformers(made: Any) -> None:
    model, _, config, params = made
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()

    def mean(params: Any) -> jax.Array:
        total, count = jax_llama.loss(params, config, TOKENS)
        return total / count

    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    for path, leaf in jax_weights._named_leaves(jax.jit(jax.grad(mean))(params)):
        stacked = path.startswith("layers/")
        names = jax_weights._hf_names(path, leaf)
        for name, array in zip(names, leaf if stacked else [leaf], strict=True):
            array = array.T if jax_weights._is_transposed(path, array.ndim) else array
            np.testing.assert_allclose(array, theirs[name], rtol=1e-3, atol=2e-6, err_msg=name)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("shard_bytes", [60_000, 10**9], ids=["in files", "in one file"])
def test_in_and_out_bit_for_bit(made: Any, shard_bytes: int, tmp_path: Path) -> None:
    model, folder, config, params = made
    model_of_ours = torch_llama.load_hf(folder)
    saves: dict[str, Callable[[Path], None]] = {
        "jax": lambda to: jax_llama.save_hf(to, config, params, shard_bytes=shard_bytes),
        "torch": lambda to: torch_llama.save_hf(to, model_of_ours, shard_bytes=shard_bytes),
    }
    before = tensors(folder)
    for name, save in saves.items():
        to = tmp_path / name
        save(to)
        files = sorted(to.glob("*.safetensors"))
        index = to / "model.safetensors.index.json"
        assert index.exists() == (len(files) > 1) == (shard_bytes < 10**9)
        if index.exists():
            where = json.loads(index.read_text())
            sizes = {tensor: array.nbytes for tensor, array in before.items()}
            assert where["metadata"]["total_size"] == sum(sizes.values())
            assert {path.name for path in files} == set(where["weight_map"].values())
            for path in files:
                assert len(load_file(path)) == 1 or path.stat().st_size < shard_bytes + 10_000
        after = tensors(to)
        assert before.keys() == after.keys()
        for tensor, array in before.items():
            assert array.dtype == after[tensor].dtype
            assert array.tobytes() == after[tensor].tobytes(), tensor
        again, loaded = jax_llama.load_hf(to)
        assert again == config
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))
        reread, info = transformers.LlamaForCausalLM.from_pretrained(to, output_loading_info=True)
        assert not any(info.values()), info
        assert reread.config.rope_parameters == model.config.rope_parameters
        for parameter, other in zip(model.parameters(), reread.parameters(), strict=True):
            assert torch.equal(parameter, other)


def test_a_model_that_is_saved_again_leaves_no_old_files(made: Any, tmp_path: Path) -> None:
    _, folder, config, params = made
    model = torch_llama.load_hf(folder)
    for name, save in {
        "jax": lambda to, size: jax_llama.save_hf(to, config, params, shard_bytes=size),
        "torch": lambda to, size: torch_llama.save_hf(to, model, shard_bytes=size),
    }.items():
        to = tmp_path / name
        for size, number in ((10**9, 1), (60_000, 0), (120_000, 0), (10**9, 1)):
            save(to, size)
            files = list(to.glob("*.safetensors"))
            assert (len(files) == 1) == (to / "model.safetensors").exists() == bool(number)
            assert set(jax_llama.weight_files(to)) == set(files)


def test_a_bias_is_a_vector_to_the_optimizer() -> None:
    """It is neither projected nor split over a mesh, and every step trains it."""
    config = jax_llama.LlamaConfig.from_hf_dict(SHAPED[BIASED])
    shapes = jax.eval_shape(lambda: jax_llama.init(config, 0))
    attention = shapes["layers"]["attention"]
    assert attention["query_bias"].shape == (2, 8 * 16)
    assert shapes["layers"]["mlp"]["down_bias"].shape == (2, 48)
    names = {path for path, x in jax_weights._named_leaves(shapes) if "bias" in path}
    assert len(names) == 4 + 3
    leaves = dict(jax_weights._named_leaves(shapes))
    assert not any(jax_llama.is_projected(name, leaves[name]) for name in names)
    specs = partition_specs(shapes, sharding.make_mesh(fsdp=2, tensor=4))
    assert specs["layers"]["attention"]["query_bias"] == jax.P(None, None)
    tx = osd_jax.make_optimizer(
        "galore_adamw",
        "continuous",
        learning_rate=0.01,
        rank=4,
        select=jax_llama.is_projected,
        dimension_numbers=jax_llama.dimension_numbers,
    )
    state = jax.eval_shape(lambda: init_state(jax_llama.init(config, 0), tx))
    batch = {"tokens": TOKENS[None], "mask": np.ones_like(TOKENS[None], bool)}
    for make in (make_train_step, make_layerwise_train_step):
        new, _ = jax.eval_shape(make(config, tx), state, batch, False)
        assert jax.tree.map(np.shape, new) == jax.tree.map(np.shape, state)
    model = torch_llama.build(torch_llama.config_from_dict(SHAPED[BIASED]), seed=0)
    projected = {n for n, p in model.named_parameters() if torch_llama.is_projected(n, p)}
    assert len(projected) == 2 * 7 and not any(name.endswith("bias") for name in projected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type is 'dynamic': .*'llama3'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' has factor None: expected a pos"),
        ({"rope_scaling": SCALING | {"factor": "8"}}, "'llama3' has factor '8'"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "'llama3' has low_freq_factor None",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear': expected an object"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is .*Sequence"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2': expected 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': this model supports only 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1: this model supports only 0.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*bits"),
    ],
)
def test_what_is_not_supported_is_refused_before_weights_are_read(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Both libraries say the same; there are no weights in the folder."""
    values = {name: x for name, x in LLAMA_3.items() if not name.startswith("rope_s")}
    (tmp_path / "config.json").write_text(json.dumps(values | SMALL | change))
    said = []
    for load in (jax_llama.load_hf, torch_llama.load_hf):
        with pytest.raises(ValueError, match=rf"config\.json: .*{message}") as error:
            load(tmp_path)
        said.append(str(error.value))
    assert said[0] == said[1]
