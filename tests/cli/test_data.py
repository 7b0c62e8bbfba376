"""The readers of aqlm_c.data: every source type, the spread of samples, and what is said of bad input."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from aqlm_c.io import data


class ByteTokenizer:
    """One token per UTF-8 byte, so that a test reads its text back."""

    def __init__(self):
        self.seen = 0  # characters tokenised

    def __len__(self):
        return 256

    def __call__(self, text, verbose=True, add_special_tokens=True):
        if not isinstance(text, str):
            return {"input_ids": [self(part)["input_ids"] for part in text]}
        self.seen += len(text)
        return {"input_ids": list(text.encode())}


@pytest.fixture
def tokenizer():
    return ByteTokenizer()


def text_of(ids):
    return bytes(ids.flatten().tolist()).decode()


def test_samples_are_spread_evenly_and_in_order(tmp_path, tokenizer):
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for path, letter in zip(paths, "abc", strict=True):
        path.write_text("".join(f"{letter}{n:02d}." for n in range(50)))
    ids = data.load_sequences([str(p) for p in paths], tokenizer, samples=8, sequence_length=4)
    assert ids.dtype == torch.int64
    assert ids.shape == (8, 4)
    assert [text_of(row) for row in ids] == ["a00.", "a01.", "a02.", "b00.", "b01.", "b02.", "c00.", "c01."]


def test_shuffle_draws_without_replacement_by_seed(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{n:03d}." for n in range(100)))

    def draw(seed):
        ids = data.load_sequences([str(path)], tokenizer, 100, 4, shuffle=True, seed=seed)
        return [text_of(row) for row in ids]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert sorted(draw(0)) == [f"{n:03d}." for n in range(100)]


def test_text_is_one_stream_read_as_far_as_needed(tmp_path, tokenizer):
    path = tmp_path / "long.txt"
    path.write_text("é" * 50_000)
    assert data.token_stream(str(path), tokenizer, limit=1000).numel() == 1000
    assert tokenizer.seen == 16_000
    assert data.token_stream(str(path), tokenizer).numel() == 100_000


@pytest.mark.parametrize("ended", ["\n\n", "\n", " ", ""])
def test_parts_of_a_text_make_the_same_stream(tmp_path, tokenizer, monkeypatch, ended):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"number{i}{ended}" for i in range(2000)))
    monkeypatch.setattr(data, "_PART", 500)
    whole = data.token_stream(str(path), tokenizer)
    for limit in (None, 1, 1000, 10**6):
        parts = data.token_stream(str(path), tokenizer, limit, whole=False)
        assert parts.dtype == torch.int64 and torch.equal(parts, whole[:limit])
    text = path.read_text()
    parts = list(data._parts(text))
    assert "".join(parts) == text and max(map(len, parts)) <= 500 and len(parts) < 2 * len(text) / 500 + 2
    assert not ended or all(part.startswith(ended) for part in parts[1:])


@pytest.mark.parametrize("name, text", [("a.txt", "a\r\nb"), ("a.jsonl", '{"text": "a\\nb"}\r\n')])
def test_byte_order_marks_and_carriage_returns_are_no_text(tmp_path, tokenizer, name, text):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    for limit in (None, 3):
        assert text_of(data.token_stream(str(tmp_path / name), tokenizer, limit)) == "a\nb"


def test_later_rows_of_a_data_set_that_fail_are_named(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def lost():
        yield {"text": "a"}
        raise ConnectionError("the line\nis dead")

    class Rows(list):
        def __iter__(self):
            return lost() if not self else super().__iter__()

    for rows, said in ((Rows(), "ConnectionError|the line"), (Rows([{"text": "a"}, {"text": None}]), "text: got None")):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, rows=rows, **__: rows)
        with pytest.raises(ValueError, match=f"data: got 'own/set': a row cannot be read: .*({said})"):
            data.token_stream("own/set", tokenizer)


def test_no_more_of_a_file_is_read_than_is_needed(tmp_path, tokenizer):
    path = tmp_path / "endless.txt"
    path.write_text("é漢" * 20_000)
    with open(path, "r+b") as file:
        file.truncate(2**40)  # sparse: a TiB of zeros
    assert data.token_stream(str(path), tokenizer, limit=1000).numel() == 1000
    assert text_of(data.token_stream(str(path), tokenizer, limit=1000)[:5]) == "é漢"
    (tmp_path / "cut.txt").write_bytes("漢".encode()[:2])
    with pytest.raises(ValueError, match="not UTF-8 text"):
        data.token_stream(str(tmp_path / "cut.txt"), tokenizer, limit=10)


def test_more_text_is_read_where_tokens_are_long(tmp_path):
    class Sparse(ByteTokenizer):  # a token for every hundred characters
        def __call__(self, text, verbose=True):
            return {"input_ids": list(range(len(text) // 100))}

    path = tmp_path / "long.txt"
    path.write_text("x" * 100_000)
    assert data.token_stream(str(path), Sparse(), limit=300).tolist() == list(range(300))


def test_jsonl_documents_have_blank_lines_between_them(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "id": 7}\n')
    assert text_of(data.token_stream(str(path), tokenizer)) == "one\n\ntwo"


@pytest.mark.parametrize("shape", [(12,), (2, 6)], ids=["stream", "rows"])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_token_ids(tmp_path, tokenizer, suffix, shape):
    path = tmp_path / f"ids{suffix}"
    ids = np.arange(12, dtype=np.uint16).reshape(shape)
    np.save(path, ids) if suffix == ".npy" else save_file({"input_ids": ids}, path)
    assert data.token_stream(str(path), tokenizer).tolist() == list(range(12))
    # A row does not continue in the next: two windows of 4 in each 6 would be [4, 5, 6, 7].
    expected = [[0, 1, 2, 3], [4, 5, 6, 7]] if len(shape) == 1 else [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert data.load_sequences([str(path)], tokenizer, 2, 4).tolist() == expected


def test_datasets_name_config_and_split(tmp_path, tokenizer):
    pytest.importorskip("datasets")
    for split in ("train", "test"):
        rows = [{"text": f"{split}{n}"} for n in range(3)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert text_of(data.token_stream(str(tmp_path), tokenizer)) == "train0\n\ntrain1\n\ntrain2"
    assert text_of(data.token_stream(f"{tmp_path},default:test", tokenizer)) == "test0\n\ntest1\n\ntest2"
    drawn = text_of(data.load_sequences([str(tmp_path)], tokenizer, 1, 22, shuffle=True, seed=1))
    assert sorted(drawn.split("\n\n")) == ["train0", "train1", "train2"]


def test_bundled_text_is_the_default(tokenizer):
    ids = data.load_sequences([], tokenizer, 2, 64)
    assert text_of(ids).startswith('The "assert" statement')
    assert data.token_stream(data.BUNDLED, tokenizer).numel() > 400_000


def test_provenance(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("x" * 100)
    ids = data.load_sequences([str(path)], tokenizer, 2, 8)
    kept = data.provenance([str(path)], ids)
    assert kept["sources"] == {str(path): hashlib.sha256(b"x" * 100).hexdigest()}
    assert kept["input_ids"] == hashlib.sha256(np.full(16, ord("x"), "<i8").tobytes()).hexdigest()
    assert kept["input_ids"] != data.provenance([str(path)], ids + 1)["input_ids"]
    assert len(data.provenance([], ids)["sources"][data.BUNDLED]) == 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"x" * 31, "31 tokens hold 3 sequences of 8, expected 4 \\(32 tokens\\)"),
        ("empty.txt", b"", "0 tokens"),
        ("latin.txt", b"\xe9" * 100, "not UTF-8"),
        ("bad.jsonl", b'{"text": "one"}\n{"text": 2}\n', "line 2"),
        ("broken.jsonl", b'{"text": "one"\n', "line 1"),
        ("list.jsonl", b'["text"]\n', "line 1"),
        ("bad.npy", b"not an array", "not a readable .npy"),
        ("bad.safetensors", b"not a header", "not a readable .safetensors"),
        ("text.md", b"x" * 100, "expected a file of type .txt .jsonl"),
    ],
)
def test_bad_content_is_named(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.load_sequences([str(path)], tokenizer, 4, 8)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((2, 3, 4), np.int64), "expected integer token ids"),
        (np.zeros(100, np.float32), "float32"),
        (np.full(100, 256), "expected 0..255"),
        (np.full(100, -1), "token ids -1..-1"),
        (np.array([None] * 4), "not a readable .npy"),  # pickled objects are refused
        (np.zeros((50, 7), np.int64), "hold 0 sequences of 8"),
    ],
)
def test_bad_token_ids_are_named(tmp_path, tokenizer, ids, message):
    path = tmp_path / "ids.npy"
    np.save(path, ids)
    with pytest.raises(ValueError, match=message):
        data.load_sequences([str(path)], tokenizer, 4, 8)


def test_safetensors_without_input_ids(tmp_path, tokenizer):
    path = tmp_path / "ids.safetensors"
    save_file({"tokens": np.zeros(100, np.int64)}, path)
    with pytest.raises(ValueError, match='"input_ids"'):
        data.token_stream(str(path), tokenizer)


@pytest.mark.parametrize("source", ["nosuch.txt", "./nosuch", "/nosuch/data", "a/b/c", "no/such.jsonl"])
def test_missing_file(tokenizer, source):
    with pytest.raises(ValueError, match=f"data: got '{source}': no such file"):
        data.load_sequences([source], tokenizer, 4, 8)


@pytest.mark.parametrize("suffix", data.FILE_TYPES)
def test_a_directory_is_no_file(tmp_path, tokenizer, suffix):
    path = tmp_path / f"text{suffix}"
    path.mkdir()
    for read in (data.check_source, lambda source: data.token_stream(source, tokenizer)):
        with pytest.raises(ValueError, match=f"data: got '{path}': is a directory, expected a {suffix} file"):
            read(str(path))


def test_unknown_dataset(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"data: got 'nosuch-\w+': no such file, and no data set could be read: ."):
        data.token_stream("nosuch-dataset", tokenizer)
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"columns \['body'\], expected a string column \"text\""):
        data.token_stream(str(tmp_path), tokenizer)


@pytest.mark.parametrize(
    ("samples", "length", "message"),
    [
        (0, 8, "samples: got 0"),
        (1, 8, "samples: got 1, expected at least one for each of the 2"),
        (4, 1, "sequence_length: got 1"),
    ],
)
def test_bad_counts(tokenizer, samples, length, message):
    with pytest.raises(ValueError, match=message):
        data.load_sequences([data.BUNDLED, data.BUNDLED], tokenizer, samples, length)
