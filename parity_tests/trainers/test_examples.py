"""The examples run as documented, with small counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from examples import bare_loop, finetune_classifier, hf_trainer

KINDS = [("galore_adamw", "continuous"), ("galore_adamw8bit", "continuous_adam8bit")]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def fraction_of_first(losses: list[float]) -> float:
    return losses[-1] / losses[0]


@pytest.mark.parametrize(("optimizer", "proj_type"), KINDS)
def test_bare_loop_learns_and_resumes_bit_for_bit(optimizer: str, proj_type: str) -> None:
    figures = bare_loop.main(["--steps", "30", "--optimizer", optimizer, "--proj_type", proj_type])
    assert fraction_of_first(figures["losses"]) < 0.6
    assert len(figures["resumed"]) == 15
    assert figures["resumed"] == figures["losses"][15:]


@pytest.mark.parametrize(("optimizer", "proj_type"), KINDS)
def test_trainer_learns_and_resumes_bit_for_bit(optimizer: str, proj_type: str) -> None:
    figures = hf_trainer.main(["--steps", "30", "--optimizer", optimizer, "--proj_type", proj_type])
    assert fraction_of_first(figures["losses"]) < 0.6
    assert figures["equal"]


def test_trainer_resumes_in_two_processes() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", "2", "examples/hf_trainer.py", "--steps", "4"]
    root = Path(hf_trainer.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("resumed from step 2: the same weights at the end") == 1


@pytest.mark.parametrize(
    ("example", "steps"), [(bare_loop, 1), (hf_trainer, 1), (finetune_classifier, 0)]
)
def test_too_few_steps(example: ModuleType, steps: int, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        example.main(["--steps", str(steps)])
    assert end.value.code == 2
    assert f"--steps: {steps} is too few; expected {steps + 1} or more" in capsys.readouterr().err


def test_classifier_beats_the_majority() -> None:
    figures = finetune_classifier.main(["--steps", "80", "--test_pieces", "400"])
    # The standard error of a share of 400 is at most 0.025: four of them.
    assert figures["accuracy"] > figures["majority"] + 0.1


@pytest.mark.parametrize(
    "model_class, config_class", [(LlamaForCausalLM, LlamaConfig), (BertForMaskedLM, BertConfig)]
)
def test_classifier_starts_from_a_saved_model(
    model_class: type[PreTrainedModel], config_class: type, tmp_path: Path
) -> None:
    _, tokenizer = finetune_classifier.small_llama(["the state of the union"])
    saved = model_class(config_class(vocab_size=len(tokenizer), **SMALL))
    saved.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    model, _ = finetune_classifier.pretrained(str(tmp_path))
    loaded = dict(model.base_model.named_parameters())
    for name, param in saved.base_model.named_parameters():
        assert torch.equal(param, loaded[name]), name
    options = ["--steps", "2", "--test_pieces", "8", "--rank", "4"]
    figures = finetune_classifier.main(["--model", str(tmp_path), *options])
    assert len(figures["losses"]) == 2
