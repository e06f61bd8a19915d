"""Text -> token ids.

Every tokenizer (LLaMA's, one trained on the corpus, plain bytes, or one of Hugging Face's) becomes
a directory with a `tokenizer.json`, which the `tokenizers` package reads; transformers is imported
only to convert other formats. The directory's files are saved with a trained model.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.data.common import DataError, cache_root, prepare_once
from launch.data.corpus import full_name, open_corpus, spread

if TYPE_CHECKING:
    import tokenizers

LLAMA_VOCABULARY = 32_000
SMALLEST_VOCABULARY = 258  # 256 bytes, begin and end of text
BOS, EOS = "<s>", "</s>"
TRAINING_CHARACTERS = 20_000_000
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's directory; loaded on first use, so that it is cheap to send to workers.

    Attributes:
        directory: Contains `tokenizer.json` and `tokenizer_config.json`.
        vocab_size: Number of ids, including special tokens.
        bos_id: Id of the begin-of-text token, or None. Batches do not use it.
        eos_id: Id of the token that ends every document.
        pad_id: Id that pads rows; masked, so the loss never reads it.
    """

    directory: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int

    @cached_property
    def backend(self) -> "tokenizers.Tokenizer":
        """The `tokenizers.Tokenizer`."""
        import tokenizers

        backend = tokenizers.Tokenizer.from_file(str(self.directory / "tokenizer.json"))
        backend.no_truncation()  # some files ask for one
        backend.no_padding()
        backend.encode_special_tokens = True  # "</s>" in a document is four characters, not its end
        return backend

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "backend"}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without special tokens."""
        found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def encode_document(self, text: str) -> np.ndarray:
        """Token ids of a text, int32, with the end-of-text id at the end."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return np.array([*ids, self.eos_id], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, without special tokens."""
        return str(self.backend.decode([int(token) for token in ids], skip_special_tokens=True))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the files that `AutoTokenizer.from_pretrained(directory)` needs."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.directory / name).exists():
                shutil.copyfile(self.directory / name, target / name)


@dataclass(frozen=True)
class NoTokenizer(Tokenizer):
    """Placeholder if the data are token ids and no tokenizer is given."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Not supported.

        Raises:
            DataError: Always.
        """
        raise DataError(
            "a data set of token ids has no tokenizer: give --tokenizer to turn text into ids"
        )

    encode_document = encode_batch  # type: ignore[assignment]

    def decode(self, ids: Iterable[int]) -> str:
        """The ids as decimal numbers."""
        return " ".join(str(int(token)) for token in ids)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes nothing."""


def load_tokenizer(
    spec: str | None,
    dataset: str,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    vocab_size: int = LLAMA_VOCABULARY,
    text_column: str = "text",
) -> Tokenizer:
    """Finds, converts or trains the tokenizer for a data set and a model.

    Args:
        spec: A Hugging Face tokenizer's directory or name; `byte` for plain UTF-8 bytes; None for
            the LLaMA tokenizer if its 32,000 pieces fit the model's vocabulary, otherwise a
            byte-level BPE with the model's vocabulary size, trained on the training split. With
            `tokens:` data None means that there is no tokenizer.
        dataset: The data set's name, as in `open_data`.
        data_dir: As in `open_data`.
        cache_dir: As in `open_data`.
        vocab_size: The model's vocabulary.
        text_column: As in `open_data`.

    Raises:
        DataError: There is no such tokenizer, it is larger than the model's vocabulary, or it has
            no end-of-text token.
    """
    cache = cache_root(cache_dir)
    name = full_name(dataset)
    if spec is None and name.startswith("tokens:"):
        return NoTokenizer(Path(), vocab_size, None, 0, 0)
    if spec == "byte":
        tokenizer = _from_directory(_trained(cache, "byte", SMALLEST_VOCABULARY, []), spec)
    elif spec is not None:
        tokenizer = _from_directory(_hugging_face(cache, spec), spec)
    elif vocab_size >= LLAMA_VOCABULARY:
        tokenizer = _from_directory(_llama(cache), "the LLaMA tokenizer")
    else:
        if vocab_size < SMALLEST_VOCABULARY:
            raise DataError(
                f"a vocabulary of {vocab_size} has no room for 256 bytes and two special tokens: "
                f"give a model config with vocab_size {SMALLEST_VOCABULARY} or more"
            )
        corpus = open_corpus(dataset, data_dir, cache_dir, text_column=text_column)
        sample = _limited(spread(corpus.train, TRAINING_CHARACTERS // 500))
        tokenizer = _from_directory(_trained(cache, corpus.identity, vocab_size, sample), dataset)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer {spec or tokenizer.directory.name!r} has a vocabulary of "
            f"{tokenizer.vocab_size}, but the model one of {vocab_size}: give a model config with "
            f"vocab_size {tokenizer.vocab_size} or more, or another --tokenizer"
        )
    return tokenizer


def _limited(texts: Iterable[str]) -> Iterator[str]:
    left = TRAINING_CHARACTERS
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text


def _trained(cache: Path, corpus: str, vocab_size: int, texts: Iterable[str]) -> Path:
    """A byte-level BPE trained on `texts`, cached; without texts its pieces are the bytes."""
    digest = hashlib.sha256(f"{corpus} {vocab_size}".encode()).hexdigest()[:16]

    def build(directory: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        _write(tokenizer, directory, bos_token=BOS, eos_token=EOS, pad_token=EOS)

    return prepare_once(
        cache / f"tokenizer-{vocab_size}-{digest}", f"a tokenizer of {vocab_size} pieces", build
    )


def _llama(cache: Path) -> Path:
    """The LLaMA-style sentencepiece model of `mistral-common`, converted once."""
    spec = importlib.util.find_spec("mistral_common")
    places = (spec.submodule_search_locations if spec else None) or []
    model = next(
        (path for path in (Path(p) / "data/tokenizer.model.v1" for p in places) if path.exists()),
        None,
    )
    if model is None:
        raise DataError(
            f"a vocabulary of {LLAMA_VOCABULARY} uses the tokenizer in the package "
            "'mistral-common', which is not installed: pip install mistral-common, or give "
            "--tokenizer DIRECTORY"
        )

    def build(directory: Path) -> None:
        _convert_sentencepiece(model, directory)

    return prepare_once(cache / "tokenizer-llama-v1", "the LLaMA tokenizer", build)


def _convert_sentencepiece(model: Path, directory: Path) -> None:
    """Converts a LLaMA-style sentencepiece model (BPE, byte fallback) to a `tokenizer.json`.

    Merges follow the pieces' scores, as in sentencepiece; transformers 5.23 uses the order of their
    ids, which differs for runs of spaces, and drops a space at the start of a text.

    Raises:
        DataError: The package `sentencepiece` is missing.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise DataError(f"{model} needs the package 'sentencepiece': pip install it") from error
    from tokenizers import Tokenizer, decoders, models, normalizers

    source = SentencePieceProcessor(model_file=str(model))
    vocab = {source.id_to_piece(i): i for i in range(source.get_piece_size())}
    words = {
        piece: source.get_score(i)
        for piece, i in vocab.items()
        if not (source.is_control(i) or source.is_unknown(i) or source.is_byte(i))
    }
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(words, key=lambda piece: -words[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in words and piece[cut:] in words
    ]
    unk, bos, eos = map(source.id_to_piece, (source.unk_id(), source.bos_id(), source.eos_id()))
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True)
    )
    space = "\u2581"
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([unk, bos, eos])
    _write(tokenizer, directory, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=eos)


def _write(tokenizer: "tokenizers.Tokenizer", directory: Path, **special: str) -> None:
    """Writes a tokenizer as a directory that `AutoTokenizer` reads."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | special, indent=2))


def _hugging_face(cache: Path, spec: str) -> Path:
    """A directory with `tokenizer.json` for a local directory or a name on the Hugging Face hub."""
    local = Path(spec).expanduser()
    if not local.exists() and (local.is_absolute() or spec.startswith(".") or spec.count("/") > 1):
        raise DataError(
            f"tokenizer {spec!r}: there is no such directory; give one with a tokenizer.json, a "
            "name on the Hugging Face hub, or 'byte'"
        )
    if (local / "tokenizer.json").exists():
        return local.resolve()
    sentencepiece = local / "tokenizer.model"
    bare = sentencepiece.exists() and not (local / "tokenizer_config.json").exists()

    def build(directory: Path) -> None:
        if bare:
            _convert_sentencepiece(sentencepiece, directory)
            return
        from transformers import AutoTokenizer

        try:
            AutoTokenizer.from_pretrained(spec).save_pretrained(directory)
        except Exception as error:  # transformers raises errors of many libraries
            why = str(error).strip().partition("\n")[0]
            raise DataError(
                f"cannot load the tokenizer {spec!r} ({type(error).__name__}: {why}): give a "
                "directory with a tokenizer.json, a name on the Hugging Face hub, or 'byte'"
            ) from error
        if not (directory / "tokenizer.json").exists():
            raise DataError(f"tokenizer {spec!r} has no fast form (tokenizer.json): choose another")

    if local.is_dir():
        stamps = [
            (str(path.resolve()), path.stat().st_mtime_ns) for path in sorted(local.glob("*token*"))
        ]
        key = hashlib.sha256(json.dumps([str(local.resolve()), stamps]).encode()).hexdigest()[:16]
    else:
        key = re.sub(r"[^\w.-]", "--", spec)
    return prepare_once(cache / f"tokenizer-hf-{key}", f"tokenizer {spec}", build)


def _from_directory(directory: Path, spec: str) -> Tokenizer:
    """Reads the special ids of a tokenizer directory."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).exists():
            config |= json.loads((directory / name).read_text(encoding="utf-8"))

    def token_id(key: str) -> int | None:
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        return None if token is None else backend.token_to_id(token)

    eos = token_id("eos_token")
    if eos is None:
        raise DataError(
            f"tokenizer {spec!r} has no eos_token, which must end each document: choose another"
        )
    pad = token_id("pad_token")
    vocab_size = max(backend.get_vocab().values()) + 1
    return Tokenizer(directory, vocab_size, token_id("bos_token"), eos, eos if pad is None else pad)
