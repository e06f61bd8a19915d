"""The Hugging Face LLaMA as used by the trainer: config, weights, files, loss, and steps."""

import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import osd_torch
from launch.data import is_exact, reshard
from osd_torch import llama
from osd_torch.llama.train import learning_rate_schedule, make_eval_step, make_train_step, sample
from parity_tests.support import ROOT
from parity_tests.support.trainer_runs import unreadable_models

transformers = pytest.importorskip("transformers")

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_sequence_length": 64,
}


def build(seed: int = 0, **changes: Any) -> Any:
    dtype = changes.pop("dtype", torch.float32)
    return llama.build(llama.config_from_dict(CONFIG | changes), seed=seed, dtype=dtype)


def batch(rows: int = 3, length: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = np.random.default_rng(seed)
    tokens = torch.from_numpy(draw.integers(0, 300, (rows, length), dtype=np.int32))
    ends = torch.from_numpy(draw.integers(2, length + 1, (rows, 1)))
    return tokens, torch.arange(length) < ends  # padded on the right


# ---------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda p: p.stem)
def test_published_configs(path: Path) -> None:
    config, values = llama.load_config(path), json.loads(path.read_text())
    assert config.max_position_embeddings == values["max_sequence_length"]
    assert config.pad_token_id is None or config.pad_token_id >= 0
    for name in llama.REQUIRED:
        assert getattr(config, name) == values[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2': expected 'llama'"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"hidden_size": 0}, "hidden_size is 0: expected a positive integer"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0: expected a positive integer"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_h"),
        ({"num_attention_heads": 32, "num_key_value_heads": 32}, "head_dim is 1: rotary"),
        ({"rms_norm_eps": "small"}, "the LLaMA config cannot be read: .*rms_norm_eps"),
    ],
)
def test_a_config_that_is_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        llama.load_config(path)


# ------------------------------------------------------------------------------- the model


def test_fresh_weights_are_hugging_faces_and_follow_the_seed() -> None:
    state = torch.get_rng_state()
    model, again, other = build(0), build(0), build(1)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, x), y, z in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(x, y), name
        if name.endswith("norm.weight"):
            assert (x == 1).all()
        else:
            assert not torch.equal(x, z)
            assert float(x.detach().std()) == pytest.approx(0.02, rel=0.1), name
    assert model.config._attn_implementation == "sdpa"
    assert build(dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def test_the_padding_token_is_learned_as_any_other() -> None:
    """It is often the end-of-text token, too."""
    model = build(pad_token_id=5)
    assert model.config.pad_token_id == 5
    assert model.model.embed_tokens.weight[5].abs().sum() > 0
    llama.loss(model, torch.full((1, 8), 5))[0].backward()
    assert model.model.embed_tokens.weight.grad[5].abs().sum() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_files(tied: bool, tmp_path: Path) -> None:
    model = build(tie_word_embeddings=tied, pad_token_id=5, dtype=torch.bfloat16)
    llama.save_hf(tmp_path / "a", model)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "config.json", "model.safetensors",
    }  # fmt: skip
    assert ("lm_head.weight" in load_file(tmp_path / "a" / "model.safetensors")) != tied
    ours = llama.load_hf(tmp_path / "a")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    for (name, x), y, z in zip(
        model.named_parameters(), ours.parameters(), theirs.parameters(), strict=True
    ):
        assert torch.equal(x, y) and torch.equal(x, z), name
    assert ours.config.pad_token_id == theirs.config.pad_token_id == 5
    assert ours.model.embed_tokens.padding_idx is None
    wide = llama.load_hf(tmp_path / "a", dtype=torch.float32)
    assert {x.dtype for x in wide.parameters()} == {torch.float32}


def test_sharded_files_of_transformers_are_read(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    for x, y in zip(model.parameters(), llama.load_hf(tmp_path).parameters(), strict=True):
        assert torch.equal(x, y)


def test_files_that_are_wrong(tmp_path: Path) -> None:
    llama.save_hf(tmp_path, build())
    path = tmp_path / "model.safetensors"
    good = load_file(path)
    name = "model.norm.weight"
    for tensors, message in (
        ({k: v for k, v in good.items() if k != name}, f"lacks 1 tensors, {name} first"),
        (good | {"other": good[name].clone()}, "lacks: 1 tensors, other first"),
        (good | {name: torch.ones(7)}, rf"{name} has shape \(7,\), but the config expects \(32,\)"),
    ):
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            llama.load_hf(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        llama.load_hf(tmp_path)
    path.unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        llama.load_hf(tmp_path)


def test_models_that_cannot_be_read_are_refused_in_the_same_words_as_by_jax(tmp_path: Path) -> None:
    jax_llama = pytest.importorskip("osd_jax.llama")
    llama.save_hf(tmp_path / "good", build())
    for name, (folder, message) in unreadable_models(tmp_path, tmp_path / "good").items():
        if not (folder / "config.json").exists():  # for the trainers to tell
            continue
        said = []
        for load in (llama.load_hf, jax_llama.load_hf):
            with pytest.raises((OSError, ValueError), match=message) as error:
                load(folder)
            said.append((type(error.value), str(error.value)))
        assert said[0] == said[1], name


def test_jax_reads_these_files_and_torch_jaxs(tmp_path: Path) -> None:
    """With the same loss."""
    jax_llama = pytest.importorskip("osd_jax.llama")
    tokens, mask = batch()
    llama.save_hf(tmp_path / "torch", build())
    config, params = jax_llama.load_hf(tmp_path / "torch")
    jax_llama.save_hf(tmp_path / "jax", config, params)
    back = llama.load_hf(tmp_path / "jax")
    for x, y in zip(build().parameters(), back.parameters(), strict=True):
        assert torch.equal(x, y)
    theirs = jax_llama.loss(params, config, tokens.numpy(), mask.numpy())
    ours = llama.loss(back, tokens, mask)
    assert int(theirs[1]) == int(ours[1])
    assert float(theirs[0]) == pytest.approx(float(ours[0]), rel=1e-6)


def test_is_projected() -> None:
    chosen = [name for name, p in build().named_parameters() if llama.is_projected(name, p)]
    assert len(chosen) == 2 * 7
    assert {llama.kind(name) for name in chosen} == {
        "attention/query", "attention/key", "attention/value", "attention/output",
        "mlp/gate", "mlp/up", "mlp/down",
    }  # fmt: skip


# -------------------------------------------------------------------------------- the loss


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("logits_bytes", [llama.LOGITS_BYTES, 4 * 300 * 7, 1])
def test_the_loss_is_transformers(logits_bytes: int) -> None:
    """Whole, in slices that do not divide the tokens, and token by token."""
    model, (tokens, mask) = build(), batch()
    total, count = llama.loss(model, tokens, mask, logits_bytes=logits_bytes)
    labels = tokens.long().masked_fill(~mask, -100)
    theirs = model(tokens, labels=labels).loss
    assert int(count) == int(mask[:, 1:].sum())
    assert float(total / count) == pytest.approx(float(theirs), rel=1e-6)
    for x, y in zip(gradients(model, total / count), gradients(model, theirs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-7)


def test_without_a_mask_every_token_but_the_first_is_learned() -> None:
    model, (tokens, mask) = build(), batch()
    whole = llama.loss(model, tokens, torch.ones_like(mask))
    total, count = llama.loss(model, tokens)
    assert int(count) == 3 * 15 and torch.equal(total, whole[0])


def test_a_document_in_a_packed_row_is_as_alone() -> None:
    """With the losses of JAX, which excludes the same labels."""
    jax_llama = pytest.importorskip("osd_jax.llama")
    model, (tokens, _) = build(), batch()
    segments = torch.tensor([[1] * 5 + [2] * 11, [4] * 16, [1] * 2 + [2] * 6 + [0] * 8]).int()
    is_label = segments.roll(1, dims=1) == segments
    total, count = llama.loss(model, tokens, is_label, segments)
    assert int(count) == int(is_label[:, 1:].sum()) == 3 * 15 - 3
    parts = [
        row[of == document][None]
        for row, of in zip(tokens, segments, strict=True)
        for document in of.unique()
    ]
    alone = sum(llama.loss(model, part)[0] for part in parts)
    assert float(total) == pytest.approx(float(alone), rel=1e-6)
    with tempfile.TemporaryDirectory() as folder:
        llama.save_hf(folder, model)
        config, params = jax_llama.load_hf(folder)
    numbers = (x.numpy() for x in (tokens, is_label))
    theirs = jax_llama.loss(params, config, *numbers, segments=segments.numpy())
    assert float(theirs[0]) == pytest.approx(float(total), rel=1e-6)


def test_a_factor_that_is_no_number_reaches_every_gradient() -> None:
    model, (tokens, mask) = build(), batch()
    total, _ = llama.loss(model, tokens, torch.zeros_like(mask))
    for gradient in gradients(model, total * math.nan)[1:]:  # the embedding: of its tokens only
        assert gradient.isnan().any()


# ------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "cosine_restarts"])
def test_the_schedule_is_jaxs(scheduler: str) -> None:
    train = pytest.importorskip("osd_jax.llama.train")
    options = dict(
        num_training_steps=100, warmup_steps=10, min_lr_ratio=0.1, cycle_length=30,
        restart_warmup_steps=5,
    )  # fmt: skip
    ours = learning_rate_schedule(scheduler, **options)
    theirs = train.learning_rate_schedule(scheduler, **options)
    np.testing.assert_allclose([ours(s) for s in range(110)], theirs(np.arange(110)), atol=1e-6)


def test_a_schedule_that_is_wrong() -> None:
    with pytest.raises(ValueError, match="expected linear, cosine or cosine_restarts"):
        learning_rate_schedule("step", num_training_steps=10)
    with pytest.raises(ValueError, match="cosine_restarts needs at least 1"):
        learning_rate_schedule("cosine_restarts", num_training_steps=10)


def run(micro_batches: int, clip: float = 0.0, **modes: bool) -> tuple[Any, list[Any]]:
    """Six rows of different lengths, in one micro-batch or three; twice."""
    model = build()
    optimizer = osd_torch.make_optimizer(
        model.named_parameters(), "galore_adamw", "std", lr=0.01, rank=4, update_proj_gap=5
    )
    step = make_train_step(
        model, optimizer, schedule=lambda step: (1.0, 0.5)[step],
        micro_batches=micro_batches, grad_clipping=clip, **modes,
    )  # fmt: skip
    tokens, mask = batch(rows=6)
    shape = (micro_batches, -1, 16)
    both = {"tokens": tokens.reshape(shape).numpy(), "mask": mask.reshape(shape).numpy()}
    metrics = [step(n, both, n == 1) for n in range(2)]
    assert optimizer.param_groups[0]["lr"] == 0.005
    return model, metrics


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_micro_batches_count_by_their_tokens(clip: float) -> None:
    (model, metrics), (other, others) = run(1, clip=clip), run(3, clip=clip)
    for a, b in zip(metrics, others, strict=True):
        # P is fresh: its distance from orthonormal is float32's rounding, about 1e-7.
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_micro_batch_without_a_token_to_predict_adds_nothing() -> None:
    model = build()
    optimizer = osd_torch.make_optimizer(
        model.named_parameters(), "galore_adamw", "continuous", lr=0.01, rank=4
    )
    step = make_train_step(
        model, optimizer, schedule=lambda step: 1.0, micro_batches=2, per_layer=True
    )
    tokens, mask = (x.numpy() for x in batch(rows=2))
    both = {"tokens": np.stack([tokens, tokens]), "mask": np.stack([mask, mask & False])}
    for n in range(3):
        metrics = step(n, both, False)
    assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])


def test_layer_by_layer_is_the_same_step_with_the_same_diagnostics() -> None:
    (model, metrics), (other, others) = run(1), run(1, per_layer=True)
    for a, b in zip(metrics, others, strict=True):
        a.pop("gradient_norm"), b.pop("gradient_norm")  # of G, and of R
        assert a == pytest.approx(b, rel=1e-6)
    assert sum(name.startswith("energy/") for name in metrics[1]) == 7
    assert not any("/" in name for name in metrics[0])
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y)


def test_compressed_gradients_clip_the_low_rank_gradient_on_one_process_too() -> None:
    """As layer by layer, and as on several processes."""
    compressed, other = run(1, 0.5, compress_gradients=True), run(1, 0.5, per_layer=True)
    norms = [[metrics["gradient_norm"] for metrics in found[1]] for found in (compressed, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert min(norms[0]) > 0.5
    for x, y in zip(compressed[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["galore_adamw", "osd_muon"])
def test_a_compiled_step_trains_alike(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    tokens, mask = batch()
    both = {"tokens": tokens[None].numpy(), "mask": mask[None].numpy()}
    losses = []
    for compiles in (False, True):
        model = build()
        built = osd_torch.make_optimizer(
            model.named_parameters(), optimizer, "continuous", lr=0.01, rank=4, capturable=compiles
        )
        schedule = lambda step: 1 - step / 8
        step = make_train_step(
            model, built, schedule=schedule, grad_clipping=1.0, compile_step=compiles
        )
        losses.append([step(i, both, False)["loss"] for i in range(6)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    with pytest.raises(ValueError, match="not capturable"):
        make_train_step(
            model, torch.optim.SGD(model.parameters()), schedule=schedule, compile_step=True
        )


def test_energy_and_orthonormality_are_what_they_say() -> None:
    model = build()
    optimizer = osd_torch.make_optimizer(
        model.named_parameters(), "galore_adamw", "continuous", lr=0.01, rank=4, update_proj_gap=5
    )
    step = make_train_step(model, optimizer, schedule=lambda step: 1.0)
    tokens, mask = batch()
    both = {"tokens": tokens[None].numpy(), "mask": mask[None].numpy()}
    step(0, both, False)
    step(1, both, False)
    total, count = llama.loss(model, tokens, mask)
    names = [name for name, _ in model.named_parameters()]
    grads = dict(zip(names, gradients(model, total / count), strict=True))
    bases = {name: basis.clone() for name, basis in osd_torch.projectors(optimizer).items()}
    metrics = step(2, both, True)
    energy, off = [], []
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        p, g = bases[name], grads[name]
        g = g if p.shape[0] == g.shape[0] else g.mT
        assert p.shape[0] == g.shape[0]
        energy.append(float((p @ (p.mT @ g)).square().sum() / g.square().sum()))
        off.append(float((p.mT @ p - torch.eye(4)).norm()) / 2)
    assert metrics["energy/mlp/gate"] == pytest.approx(np.mean(energy), rel=1e-4)
    assert metrics["orthonormality/mlp/gate"] == pytest.approx(np.mean(off), rel=1e-4)


def test_evaluation_sums_and_leaves_no_gradient() -> None:
    model, (tokens, mask) = build(), batch()
    total, count = make_eval_step(model)({"tokens": tokens.numpy(), "mask": mask.numpy()})
    wanted = llama.loss(model, tokens, mask)
    assert (total, count) == (pytest.approx(float(wanted[0])), int(wanted[1]))
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_sample_follows_its_seed_and_ends_at_the_end_of_text() -> None:
    model, prompt = build(eos_token_id=None), np.asarray([1, 2, 3], np.int32)
    texts = [sample(model, prompt, length=20, seed=seed).tolist() for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 20 and texts[0][:3] == [1, 2, 3]
    model.config.eos_token_id = texts[0][7]
    assert sample(model, prompt, length=20).tolist() == texts[0][:7]
    assert sample(model, prompt, length=2).tolist() == [1, 2]
    # Without the cache of keys the same odds: the most likely token after the same text.
    cold = sample(model, prompt, length=4, temperature=1e-4)
    assert cold[3] == int(model(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax())


# ------------------------------------------------------------------------ places in the data


def places(*pairs: tuple[int, int]) -> list[dict[str, Any]]:
    same = {"seed": 0, "pack": False, "corpus": "text", "process_count": len(pairs)}
    return [{"document": document, "offset": offset, **same} for document, offset in pairs]


@pytest.mark.parametrize(
    ("old", "count", "document", "exact"),
    [
        (places((6, 0), (6, 0)), 1, 12, True),
        (places((12, 0)), 3, 4, True),
        (places((0, 0)), 2, 0, True),
        (places((7, 0)), 2, 4, False),  # documents 0 to 6 are taken, 7 is skipped
        (places((5, 3), (4, 0)), 1, 11, False),  # the first has begun number 10
        (places((3, 0), (5, 0)), 1, 10, False),  # the second has taken number 9
    ],
)
def test_another_number_of_processes(
    old: list[dict[str, Any]], count: int, document: int, exact: bool
) -> None:
    new = reshard(old, count)
    assert len(new) == count
    assert all(state == old[0] | {"document": document, "offset": 0, "process_count": count}
               for state in new)  # fmt: skip
    assert is_exact(old, count) == exact


def test_the_same_number_of_processes_goes_on_exactly() -> None:
    old = places((5, 3), (4, 1))
    assert reshard(old, 2) == old and is_exact(old, 2)
