"""The shape of a LLaMA, in the format of Hugging Face's configs."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

# Fields of a config that change the model, and the only value that this model supports.
_ONLY = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies to longer rows than those of pretraining.

    Attributes:
        rope_type: "linear": each frequency is divided by `factor`. "llama3": low ones are, high
            ones stay, and those between are interpolated.
        factor: See above.
        low_freq_factor: Wavelengths longer than `original_max_position_embeddings` divided by this
            are those of low frequencies; only "llama3" reads it.
        high_freq_factor: The same for high frequencies.
        original_max_position_embeddings: Length of the rows of pretraining; only "llama3" reads it.

    Raises:
        ValueError: The type is not supported, or a value is missing or not a positive number.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        """Checks type and values."""
        if self.rope_type not in _ROPE_TYPES[1:]:
            raise ValueError(
                f"rope_type is {self.rope_type!r}: this model supports only "
                f"{', '.join(map(repr, _ROPE_TYPES))}"
            )
        for name, value in self.to_hf_dict().items():
            if name != "rope_type" and (type(value) not in (int, float) or value <= 0):
                raise ValueError(
                    f"rope_type {self.rope_type!r} has {name} {value!r}: expected a positive number"
                )
        if self.low_freq_factor and self.low_freq_factor == self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor and high_freq_factor are both {self.low_freq_factor}: expected "
                "different ones"
            )

    def to_hf_dict(self) -> dict[str, Any]:
        """The fields that the type reads, as in a `config.json`."""
        values = dataclasses.asdict(self)
        names = tuple(values) if self.rope_type == "llama3" else ("rope_type", "factor")
        return {name: values[name] for name in names}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of a LLaMA; the fields have the names of Hugging Face's `LlamaConfig`.

    Frozen and hashable, so it can be a static argument of a jitted function. `head_dim` and
    `num_key_value_heads` may be omitted and are then computed.

    Raises:
        ValueError: A size is not a positive integer, or sizes are not divisible.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        """Computes omitted sizes, and checks all sizes."""
        heads = self.num_attention_heads
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", heads)
        if not self.head_dim and isinstance(heads, int) and heads > 0:
            if self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{heads}: change one, or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} is {value!r}: expected a positive integer")
            if field.type is float and (type(value) not in (int, float) or value <= 0):
                raise ValueError(f"{field.name} is {value!r}: expected a positive number")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} is {value!r}: expected true or false")
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: rotary embedding needs an even one")

    @classmethod
    def from_hf_dict(cls, values: Mapping[str, Any]) -> Self:
        """Parses a Hugging Face `config.json`, of transformers 5 or older, given as a dictionary.

        Raises:
            ValueError: It is not a LLaMA, a size is missing, or it uses an unsupported option.
        """
        if values.get("model_type") != "llama":
            raise ValueError(f"model_type is {values.get('model_type')!r}: expected 'llama'")
        architectures = values.get("architectures") or ["LlamaForCausalLM"]
        if "LlamaForCausalLM" not in architectures:
            raise ValueError(f"architectures is {architectures!r}: expected 'LlamaForCausalLM'")
        # transformers 5 writes rope_parameters; older versions write rope_theta and rope_scaling.
        rope = {"rope_theta": values.get("rope_theta") or cls.rope_theta}
        for key in ("rope_scaling", "rope_parameters"):
            given = values.get(key) or {}
            if not isinstance(given, Mapping):
                raise ValueError(f"{key} is {given!r}: expected an object, or none")
            rope |= given
        for key, only in _ONLY.items():
            if (value := {**values, **rope}.get(key, only)) not in (only, None):
                raise ValueError(f"{key} is {value!r}: this model supports only {only!r}")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        # null means "compute it" for sizes, and "none" for token ids.
        known = {
            field.name: values[field.name]
            for field in dataclasses.fields(cls)
            if field.name != "rope_scaling"
            and (
                values.get(field.name) is not None
                or (field.name in values and field.name.endswith("_token_id"))
            )
        }
        known["rope_theta"] = rope["rope_theta"]
        if rope_type != "default":
            names = [field.name for field in dataclasses.fields(RopeScaling)[1:]]
            scaling: dict[str, Any] = {name: rope.get(name) for name in names}
            known["rope_scaling"] = RopeScaling(str(rope_type), **scaling)
        # The published LLaMA configs use another name for the maximum sequence length.
        if "max_sequence_length" in values:
            known.setdefault("max_position_embeddings", values["max_sequence_length"])
        if isinstance(known.get("eos_token_id"), list):
            known["eos_token_id"] = tuple(known["eos_token_id"])
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in known]
        if missing:
            raise ValueError(f"the LLaMA config lacks {', '.join(missing)}")
        return cls(**known)

    def to_hf_dict(self) -> dict[str, Any]:
        """The `config.json` from which transformers 5 and older build the same model."""
        values = dataclasses.asdict(self)
        theta, scaling = values.pop("rope_theta"), values.pop("rope_scaling")
        biases = {name: values.pop(name) for name in ("attention_bias", "mlp_bias")}
        if self.rope_scaling:
            scaling = self.rope_scaling.to_hf_dict()
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **values,
            "hidden_act": "silu",
            **biases,
            "rope_theta": theta,
            **({"rope_scaling": scaling} if scaling else {}),
            "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": theta},
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a config file, such as `configs/llama_60m.json`.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is not JSON, or not the config of a LLaMA; the message names the file.
        """
        try:
            return cls.from_hf_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error
