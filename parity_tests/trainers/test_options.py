"""Every flag of the published commands is accepted, and every mistake is reported."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.trainer import keywords
from launch.trainer.cli import UsageError
from launch.trainer.options import FIXED, Options, count
from launch.trainer.options.groups import FLAGS, GROUPS
from osd_names import OPTIONS
from parity_tests.support import ROOT
from parity_tests.support.published_commands import PUBLISHED_7B, PUBLISHED_7B_GALORE, PUBLISHED_60M

# The published commands, verbatim except for the script's name.


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder with the project's configs and one small model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    model = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_sequence_length": 512,
    }  # fmt: skip
    (tmp_path / "small.json").write_text(json.dumps(model))


def parse(line: str = "") -> Options:
    return Options.parse(f"--model_config small.json --batch_size 4 {line}".split())


def refused(line: str, *parts: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(line).check()
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("command", [PUBLISHED_60M, PUBLISHED_7B, PUBLISHED_7B_GALORE])
def test_published_commands_mean_what_they_say(command):
    options = Options.parse(command.split()).check()
    flags = dict(re.findall(r"--(\w+) ([\w./]+)", command))
    for name, text in flags.items():
        value = options.values()[name]
        assert value == type(value)(text), name
    assert options.data.gradient_accumulation == 512 // options.data.batch_size
    devices = options.devices
    assert devices.single_gpu == devices.per_layer == ("single_gpu" in command)
    assert options.model.activation_checkpointing == ("activation_checkpointing" in command)


def test_defaults_are_the_published_ones():
    published = {
        "continue_from": None, "max_length": 256, "lr": 1e-4, "scheduler": "cosine",
        "min_lr_ratio": 0.1, "activation_checkpointing": False, "weight_decay": 0.0,
        "warmup_steps": 1000, "eval_every": 5000, "num_training_steps": 10_000,
        "max_train_tokens": None, "save_every": 10_000, "save_dir": None, "tags": None, "seed": 0,
        "name": "test", "grad_clipping": 0.0, "beta1": 0.0, "rank": 128, "update_proj_gap": 50,
        "galore_scale": 1.0, "proj_type": "std", "single_gpu": False, "dataset": "c4",
    }  # fmt: skip
    options = parse().values()
    assert {name: options[name] for name in published} == published


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        Options.parse(["--help"], prog="python -m launch.train_jax")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{name}" in shown for name in FLAGS)
    assert max(map(len, shown.splitlines())) <= 100


def test_importing_options_is_light():
    code = (
        "import sys, launch.trainer.options; print(sorted({m.split('.')[0] for m in sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not {"jax", "torch", "numpy", "transformers", "tqdm"} & set(eval(out.stdout))


def test_booleans_can_be_taken_back():
    assert parse("--pack").data.pack is True
    assert parse("--no-pack").data.pack is False
    assert parse("--resume --no-resume").run.resume is False


def test_spellings():
    options = parse("--optimizer GaLore_AdamW --dtype BF16 --proj_type Continuous").check()
    assert (options.optimizer.optimizer, options.model.dtype) == ("galore_adamw", "bfloat16")
    assert options.subspace.proj_type == "continuous"


@pytest.mark.parametrize(
    ("text", "number"), [("100M", 100_000_000), ("1B", 10**9), ("1.5k", 1500), ("1_000", 1000)]
)
def test_count(text, number):
    assert count(text) == number


def test_max_train_tokens_counts_tokens():
    options = parse("--max_train_tokens 1M --total_batch_size 8 --warmup_steps 0").check()
    assert options.optimizer.num_training_steps == 1_000_000 // (8 * 256)


def test_batches():
    assert parse("--gradient_accumulation 3").check().data.total_batch_size == 12
    assert parse("--gradient_accumulation 3").check(processes=2).data.total_batch_size == 24
    assert parse("--total_batch_size 16").check(processes=2).data.gradient_accumulation == 2
    checked = parse("--total_batch_size 16").check()
    assert checked.check() == checked


def test_cosine_restarts():
    options = parse("--scheduler cosine_restarts --num_training_steps 8K").check().optimizer
    assert (options.cycle_length, options.restart_warmup_steps) == (2000, 200)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--totalbatch_size 8", ("--totalbatch_size", "did you mean --total_batch_size?")),
        ("--no-packed", ("--no-packed", "--no-pack?")),
        ("--rank", ("--rank", "expected one argument")),
        ("--rank eight", ("--rank", "'eight'")),
        ("surplus", ("surplus",)),
        ("--max_train_tokens 1.5", ("--max_train_tokens", "'1.5'", "1M")),
        ("--optimizer galore_adam", ("'galore_adam'", "did you mean galore_adamw?", "galore_lion")),
        ("--accumulate_sketches", ("--accumulate_sketches", "only a galore_* optimizer")),
        ("--optimizer galore_adamw --accumulate_sketches --compress_gradients", ("use one of",)),
        ("--optimizer galore_adamw --projector_init qr", ("--projector_init", "continuous*")),
        ("--offload_inputs", ("--offload_inputs", "add --per_layer")),
        ("--no-reshard_after_forward", ("--no-reshard_after_forward", "add --fsdp")),
        ("--shard_over_data --per_layer --optimizer galore_adamw", ("--per_layer", "--mesh fsdp=")),
        (
            "--shard_over_data --compress_gradients --optimizer galore_adamw",
            ("--shard_over_data", "use one of the two"),
        ),
        ("--shard_over_data --fsdp", ("--shard_over_data", "--fsdp leaves no data axis")),
        ("--shard_over_data --single_gpu", ("--shard_over_data", "--single_gpu leaves no data")),
        (
            "--no-reshard_after_forward --fsdp --optimizer galore_adamw_per_layer",
            ("--no-reshard_after_forward", "--per_layer"),
        ),
        ("--basis_dtype bfloat16", ("--basis_dtype", "only a galore_* optimizer")),
        ("--basis_dtype float16", ("'float16'", "bfloat16, float32")),
        (
            "--optimizer galore_adamw --proj_type continuous --move_projector before "
            "--accumulate_sketches --gradient_accumulation 2",
            ("--move_projector", "use after"),
        ),
        (
            "--optimizer galore_adamw --accumulate_sketches --per_layer --gradient_accumulation 2",
            ("--accumulate_sketches", "always do so"),
        ),
        ("--optimizer galore_adamw --accumulate_sketches", ("nothing is accumulated",)),
        ("--proj_type continous", ("'continous'", "did you mean continuous?")),
        ("--scheduler cosin", ("'cosin'", "cosine_restarts")),
        ("--dtype float16", ("'float16'", "bfloat16")),
        ("--rank 0", ("--rank", "0", "1 or more")),
        ("--update_proj_gap 0", ("--update_proj_gap", "0", "1 or more")),
        ("--lr 0", ("--lr", "0.0", "more than 0")),
        ("--lr nan", ("--lr", "nan", "finite")),
        ("--min_lr_ratio 1.1", ("--min_lr_ratio", "1.1", "1 or less")),
        ("--weight_decay -1", ("--weight_decay", "-1.0", "0 or more")),
        ("--total_batch_size 10", ("--total_batch_size", "10", "multiple of 4", "use 8")),
        ("--total_batch_size 2", ("--total_batch_size", "2", "use 4")),
        ("--total_batch_size 16 --gradient_accumulation 2", ("16", "8", "leave one")),
        ("--num_training_steps 10", ("--warmup_steps", "1000", "10 updates")),
        ("--max_train_tokens 1000", ("--max_train_tokens", "1000", "1024 tokens")),
        ("--max_length 1024", ("--max_length", "1024", "512 positions")),
        ("--beta1 0.9 --optimizer sgd", ("--beta1", "Adafactor", "sgd", "leave it out")),
        ("--beta2 0.9 --optimizer adafactor", ("--beta2", "Adam, Lion or Muon", "adafactor")),
        ("--beta2 1", ("--beta2", "1.0", "0.9999999 or less")),
        ("--eps 1e-8 --optimizer lion", ("--eps", "only Adam or Muon reads it", "lion")),
        ("--transport_moments", ("--transport_moments", "subspace optimizer", "leave it out")),
        (
            "--transport_moments --optimizer galore_adafactor",
            ("--transport_moments", "galore_adafactor"),
        ),
        ("--stochastic_rounding --optimizer sgd", ("--stochastic_rounding", "torch's", "leave it")),
        ("--weight_decay 0.1 --no_decay norm,,head", ("--no_decay", "'norm,,head'", "words")),
        ("--no_decay norm", ("--no_decay", "--weight_decay above 0", "leave it out")),
        ("--eps 0", ("--eps", "0.0", "more than 0")),
        ("--penalty 0.1 --optimizer galore_adamw", ("--penalty", "continuous*", "std")),
        ("--lion_sign subspace", ("--lion_sign", "galore_lion")),
        ("--cycle_length 10", ("--cycle_length", "cosine_restarts")),
        ("--scheduler cosine_restarts --cycle_length 10", ("--warmup_steps", "1000", "10 updates")),
        ("--dataset builtn", ("'builtn'", "did you mean builtin?", "c4")),
        ("--dataset text", ("'text'", "text:GLOB")),
        ("--dataset text:none/*.txt", ("none/*.txt",)),
        ("--dataset text:empty.txt", ("empty.txt is empty",)),
        ("--dataset text:empty.jsonl", ("--dataset", "empty.jsonl is empty", "fetch it again")),
        ("--dataset text:folder", ("--dataset", "folder/a.pdf", ".json.gz", ".parquet")),
        ("--dataset text:folder/none", ("--dataset", "no file matches folder/none")),
        ("--dataset c4 --separate_documents", ("--separate_documents", "add --pack")),
        (
            "--dataset tokens:small.json --separate_documents",
            ("--separate_documents", "no documents to separate"),
        ),
        ("--attention flash", ("--attention", "'flash'", "expected auto, written_out")),
        ("--dataset c4 --text_column body", ("--text_column", "only text: reads it", "c4")),
        ("--dataset text:small.json --text_column=", ("--text_column", "''")),
        ("--dataset c4 --data_dir folder", ("--data_dir", "folder/en has no c4-validation")),
        ("--dataset tokens:none.npy", ("none.npy",)),
        ("--data_dir none", ("--data_dir", "none")),
        ("--continue_from none", ("--continue_from", "none")),
        ("--resume --overwrite", ("--resume", "--overwrite", "leave one out")),
        ("--name=", ("--name", "''")),
        ("--rank 16", ("--rank", "galore_*", "adam", "leave it out")),
        ("--proj_type continuous", ("--proj_type", "galore_*", "adam")),
        ("--min_lr_ratio 0.2 --scheduler linear", ("--min_lr_ratio", "cosine", "linear")),
        ("--model_config long.json", ("long.json", "'1024'", "max_sequence_length")),
        ("--name a/b", ("--name", "'a/b'", "--run_dir")),
        ("--run_dir small.json", ("small.json is a file",)),
        ("--model_config none.json", ("none.json", "small.json")),
        ("--model_config empty.txt", ("empty.txt is not JSON",)),
        ("--model_config gpt.json", ("gpt.json", "'gpt2'", "'llama'")),
        ("--model_config part.json", ("part.json", "vocab_size", "None")),
    ],
)
def test_mistakes_are_named(line, parts):
    Path("empty.txt").touch()
    Path("empty.jsonl").touch()
    Path("folder/en").mkdir(parents=True)
    Path("folder/a.pdf").touch()
    if "--data_dir folder" in line:
        Path("folder/en/c4-train.00000-of-01024.json.gz").write_bytes(b"x")
    Path("gpt.json").write_text('{"model_type": "gpt2"}')
    Path("part.json").write_text('{"model_type": "llama"}')
    model = json.loads(Path("small.json").read_text())
    Path("long.json").write_text(json.dumps(model | {"max_sequence_length": "1024"}))
    refused(line, *parts)


def test_missing_flags_are_named():
    with pytest.raises(UsageError, match="--batch_size"):
        Options.parse(["--model_config", "small.json"])


def start_run(line: str = "") -> None:
    options = parse(line).check()
    options.run.path.mkdir(parents=True)
    (options.run.path / "options.json").write_text(json.dumps(options.record()))


def test_an_earlier_run_is_not_overwritten_by_accident():
    start_run()
    refused("", "--name", "runs/test", "--resume", "--overwrite")
    for line in ("--resume", "--overwrite", "--name other", "--continue_from runs/test --resume"):
        parse(line).check()
    assert parse("--continue_from runs/test").continues_itself
    assert not parse("--continue_from runs/test --name other").continues_itself


def test_a_run_goes_on_only_as_what_it_was():
    subspace = "--optimizer galore_adamw --rank"
    start_run(f"{subspace} 16")
    parse(f"{subspace} 16 --resume --lr 0.5").check()
    Path("some.jsonl").write_text("{}")
    start_run("--dataset text:some.jsonl --text_column body --name other")
    refused(
        "--dataset text:some.jsonl --name other --resume",
        "--text_column", "started with body, not text",
    )  # fmt: skip
    refused(f"{subspace} 8 --resume", "--rank", "started with 16, not 8")
    model = json.loads(Path("small.json").read_text())
    Path("small.json").write_text(json.dumps(model | {"hidden_size": 64}))
    refused(f"{subspace} 16 --resume", "--model_config", "hidden_size", "32", "64")
    Path("runs/test/options.json").write_text("{")
    refused(f"{subspace} 16 --resume", "options.json is damaged")


def test_overwrite_does_not_delete_what_the_command_reads():
    start_run()
    model = Path("runs/test/model")
    model.mkdir()
    shutil.copy("small.json", model / "config.json")
    refused("--overwrite --model_config runs/test/model/config.json", "--model_config", "--overwr")
    refused("--overwrite --tokenizer runs/test/model", "--tokenizer", "copy it")


def test_a_tilde_is_the_home(monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("some.txt").write_text("text")
    Path("there").mkdir()
    line = "--dataset text:~/some.txt --data_dir ~/there --model_config ~/small.json"
    options = parse(line).check()
    assert options.data.dataset == f"text:{Path.cwd()}/some.txt"
    assert options.data.data_dir == f"{Path.cwd()}/there"
    assert options.model.model_config == f"{Path.cwd()}/small.json"


def test_weights_bring_their_tokenizer():
    model = Path("weights")
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert parse("--continue_from weights").check().data.tokenizer is None
    (model / "tokenizer.json").write_text("{}")
    assert parse("--continue_from weights").check().data.tokenizer == "weights"
    assert parse("--continue_from weights --tokenizer byte").check().data.tokenizer == "byte"


def test_each_flag_stands_in_one_group():
    fields = [field.name for group in GROUPS.values() for field in dataclasses.fields(group)]
    assert sorted(fields) == sorted(FLAGS) == sorted(parse().values())
    with pytest.raises(TypeError, match="there is no flag --rnak"):
        parse().replace(rnak=8)


def test_what_is_fixed_exists():
    assert set(FIXED) <= FLAGS.keys()


def test_exit_code_and_one_line_on_stderr():
    code = (
        "import sys; from launch.trainer.cli import run_cli\n"
        "from launch.trainer.options import Options\n"
        "sys.exit(run_cli(lambda argv: print(Options.parse(argv).check().subspace.rank)))"
    )
    words = [sys.executable, "-c", code, "--model_config", "configs/llama_9m.json"]
    for more, expected in ((["--batch_size", "8"], 0), (["--rnak", "8"], 2)):
        run = subprocess.run([*words, *more], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == expected
        assert run.stderr.count("\n") == (expected == 2)
    assert run.stderr == "error: --rnak: no such flag; did you mean --rank?; see --help\n"


def test_a_word_that_no_name_has_is_named():
    keywords.check_words("norm, embed", ["layers/norm", "embedding"])
    keywords.check_words(None, [])
    with pytest.raises(UsageError, match=r"--no_decay: no parameter has 'layernorm' in its name"):
        keywords.check_words("norm,layernorm", ["layers/norm", "embedding"])
    assert [keywords.has_words(" norm , head")(name, None) for name in ("head", "mlp")] == [1, 0]


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"peak_lr", "ns_dtype", "projector_init"}))
def test_every_flag_of_an_option_reaches_the_optimizer(name: str) -> None:
    """But those that PyTorch's or JAX' trainer gives in its own types."""
    flag = "galore_scale" if name == "scale" else name
    value = object()
    options = Options.of(model_config="small.json", batch_size=4, **{flag: value})
    assert keywords.optimizer_options(options)[name] is value
