import hashlib
import lzma
import zipfile

import numpy as np
import pytest

from efflm.config import InputError
from efflm.data import dataset, enwik8

TEXT = bytes(range(256)) * 4 + "Ein Wörterbuch. ".encode() * 60


@pytest.fixture
def small(monkeypatch, tmp_path):
    """enwik8 with other bytes, fewer of them, in a folder of one's own."""
    monkeypatch.setenv("EFFLM_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(enwik8, "MD5", hashlib.md5(TEXT).hexdigest())
    parts = {"train": slice(0, 1500), "validation": slice(1500, 1700), "test": slice(1700, len(TEXT))}
    monkeypatch.setattr(enwik8, "SPLITS", parts)
    monkeypatch.setattr(dataset, "STRETCH", 64)
    return tmp_path


def write(folder, kind):
    if kind == "xz":
        (folder / "enwik8.xz").write_bytes(lzma.compress(TEXT))
    elif kind == "zip":
        with zipfile.ZipFile(folder / "enwik8.zip", "w") as archive:
            archive.writestr("enwik8", TEXT)
    else:
        (folder / "enwik8").write_bytes(TEXT)


@pytest.mark.parametrize("kind", ["raw", "xz", "zip"])
def test_every_byte_of_a_split_is_a_target_once_in_order(small, kind):
    write(small / "data", kind)
    data = dataset.prepare("enwik8", small / "cache", vocabulary=999, length=32, batch=2)
    byte_of = {int(token): byte for byte, token in enumerate(data.tokenizer.byte_ids)}
    rows = data.train[:]
    real = rows["segments"] > 0
    stream = rows["targets"][real]
    assert bytes(byte_of[token] for token in stream) == TEXT[enwik8.SPLITS["train"]]
    assert rows["inputs"][0, 0] == data.tokenizer.separator
    np.testing.assert_array_equal(rows["inputs"][real][1:], stream[:-1])
    for name in ("validation", "test"):
        text = getattr(data, name)
        assert b"".join(bytes(byte_of[token] for token in ids) for ids in text) == TEXT[enwik8.SPLITS[name]]
        assert [sum(size for _, size in each) for each in text.sized()] == text.sizes
        assert text.unbroken
        assert text.sizes == [64, 64, 64, 8] or name == "test"
    assert text.name == "stretches of 64 bytes of the test split of enwik8"


def test_bytes_are_the_tokens_of_the_byte_level_alphabet(small):
    write(small / "data", "raw")
    tokenizer = dataset.prepare("enwik8", small / "cache", vocabulary=257, length=32, batch=2).tokenizer
    text = "".join(map(chr, range(1, 0x800)))
    assert tokenizer.encode(text) == tokenizer.byte_ids[list(text.encode())].tolist()


def test_a_batch_reads_only_the_rows_it_is_asked_for(small):
    write(small / "data", "raw")
    batch = dataset.prepare("enwik8", small / "cache", vocabulary=257, length=32, batch=8).batches(8, 0)(3)
    whole = {name: np.asarray(column) for name, column in batch.items()}
    for name, column in batch.items():
        assert column.shape == whole[name].shape == (8, 32)
        np.testing.assert_array_equal(column[2:4, 8:16], whole[name][2:4, 8:16])
        np.testing.assert_array_equal(column[:, 16:], whole[name][:, 16:])


def test_other_bytes_and_no_bytes_are_refused(small, monkeypatch):
    (small / "data" / "enwik8").write_bytes(TEXT[:-1])
    with pytest.raises(InputError, match="MD5"):
        enwik8.load(small / "cache")
    assert not list((small / "cache").rglob("*nwik8*.partial"))
    (small / "data" / "enwik8").unlink()
    (small / "data" / "enwik8.xz").write_bytes(lzma.compress(TEXT)[:-20])
    with pytest.raises(InputError, match="cannot be unpacked"):
        enwik8.load(small / "cache")
    (small / "data" / "enwik8.xz").unlink()
    monkeypatch.setattr(enwik8, "URL", (small / "nothing.zip").as_uri())
    with pytest.raises(InputError, match="set EFFLM_DATA"):
        enwik8.load(small / "cache")


def test_without_EFFLM_DATA_no_folder_is_looked_into(small, monkeypatch):
    """Not even one beside the checkout: the file comes from the network."""
    monkeypatch.delenv("EFFLM_DATA")
    write(small, "zip")
    monkeypatch.setattr(enwik8, "URL", (small / "enwik8.zip").as_uri())
    opened, plain = [], lzma.open
    monkeypatch.setattr(lzma, "open", lambda path, *rest: opened.append(path) or plain(path, *rest))
    assert bytes(enwik8.load(small / "cache").train) == TEXT[:1500]
    assert not opened
