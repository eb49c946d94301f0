import collections
import hashlib
import os
from pathlib import Path

import pytest

from efflm.config import InputError
from efflm.data import corpora, dataset, files


def by_hash(name):
    return hashlib.sha256(name.encode()).digest()


def documents(corpus):
    return corpus.train + corpus.validation + corpus.test


def test_a_folder_is_split_by_file_whole_and_disjoint(tmp_path):
    folder = tmp_path / "text"
    (folder / "sub").mkdir(parents=True)
    for i in range(100):
        (folder / "sub" / f"{i}.txt").write_text(f"text {i} ünï\n" * 5)
    (folder / ".hidden").write_bytes(b"\0")
    corpus = corpora.load(str(folder), tmp_path / "cache")
    assert sorted(documents(corpus)) == sorted((f"sub/{i}.txt", f"text {i} ünï\n" * 5) for i in range(100))
    names = sorted((f"sub/{i}.txt" for i in range(100)), key=by_hash)
    assert [name for name, _ in corpus.test] == names[:10]
    assert [name for name, _ in corpus.validation] == names[10:15]
    assert [name for name, _ in corpus.train] == names[15:]


def test_a_file_is_cut_at_line_ends_and_loses_nothing(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(5000)))
    corpus = corpora.load(str(path), tmp_path / "cache")
    pieces = sorted(documents(corpus), key=lambda document: int(document[0].split("#")[1]))
    assert "".join(text for _, text in pieces) == path.read_text()
    assert all(text.endswith("\n") for _, text in pieces)
    assert corpus.validation
    assert corpus.test


def test_one_endless_line_is_cut_too(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("é" * 100_000)
    corpus = corpora.load(str(path), tmp_path / "cache")
    assert len(documents(corpus)) > 5
    assert sum(len(text) for _, text in documents(corpus)) == 100_000


def test_the_cache_is_by_content_and_survives_an_interrupted_preparation(tmp_path):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one line\n" * 3000)
    first = corpora.load(str(path), cache)
    path.write_text("two line\n" * 3000)
    second = corpora.load(str(path), cache)
    assert first.digest != second.digest
    next((cache / second.digest).rglob("dataset_info.json")).unlink()
    assert corpora.load(str(path), cache) == second


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"abc\0def", "is binary"),
        (b"caf\xe9 au lait", r"is not UTF-8 \(byte 0xe9 at offset 3\)"),
        (b"short\n", "too small"),
    ],
)
def test_bad_corpora_are_named_and_nothing_is_written(tmp_path, content, message):
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        corpora.load(str(path), tmp_path / "cache", least_bytes=1000)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no files"):
        corpora.load(str(tmp_path / "empty"), tmp_path / "cache")


def test_the_default_corpus_is_this_pythons_library_without_its_tests(tmp_path):
    found = corpora.read(corpora.DEFAULT).parts
    names = {part.name for part in found}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not [n for n in names if set(n.split("/")) & corpora.LEFT_OUT]
    assert sum(part.characters for part in found) > 5_000_000
    assert "library" in corpora.name_of(corpora.DEFAULT)


def test_text_to_score_is_whole_files_or_pieces_of_one(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n" * 10)
    (tmp_path / "blank.txt").write_text("\n \n")
    found = corpora.read(str(tmp_path)).parts
    assert [part.name for part in found] == sorted((f"{i}.txt" for i in range(5)), key=by_hash)
    assert [part.text() for part in found] == [f"text {part.name[0]}\n" * 10 for part in found]
    text = "".join(f"line {i}, née\n" for i in range(4000))
    (tmp_path / "0.txt").write_text(text)
    found = corpora.read(str(tmp_path / "0.txt")).parts
    assert [part.name for part in found] == sorted((f"0.txt#{i}" for i in range(len(found))), key=by_hash)
    assert "".join(part.text() for part in sorted(found, key=lambda part: part.start)) == text
    for part in found:
        assert (len(part.text()), len(part.text().encode())) == (part.characters, part.nbytes)
        assert part.text().endswith("\n")
        assert 0 <= part.characters - corpora.PIECE_BYTES < 20 or part.start + part.nbytes == len(text.encode())


@pytest.mark.parametrize("text", ["é😀\n" * 40, "é😀" * 60, "a" * 100, "\n" * 50 + "x", "😀"])
@pytest.mark.parametrize("stretch", [5, 16, 1000])
def test_a_document_is_read_in_stretches_that_end_with_lines_or_characters(tmp_path, monkeypatch, text, stretch):
    monkeypatch.setattr(files, "STRETCH", stretch)
    (tmp_path / "a.txt").write_bytes(text.encode())
    (part,) = files.whole("a", tmp_path, ["a.txt"], strict=False).parts
    stretches = list(part.stretches())
    assert "".join(stretches) == text
    assert all(0 < len(each.encode()) <= stretch for each in stretches)
    if stretch == 16 and "\n" in text:
        assert all(each.endswith("\n") for each in stretches[:-1])


def test_a_damaged_byte_far_into_a_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode() * 20_001 + b"\xff" + b"a" * 30_000)
    with pytest.raises(InputError, match=r"byte 0xff at offset 40002\)"):
        corpora.read(str(tmp_path / "a.txt"))


def test_held_out_documents_are_those_of_the_test_split(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(5000)))
    whole = corpora.load(str(path), tmp_path / "cache")
    for split in ("validation", "test"):
        found = [(part.name, part.text()) for part in corpora.split(str(path))[split].parts]
        assert found == getattr(whole, split)
    names = sorted((name for name, _ in documents(whole)), key=by_hash)
    assert [part.name for part in corpora.split(str(path))["test"].parts] == names[: round(0.1 * len(names))]


def some_are_not_text(folder):
    for i in range(80):
        (folder / f"{i}.txt").write_text(f"text {i} ünï\n" * 5)
    bad = {"a.png": b"\x89PNG\0\1", "b.txt": b"caf\xe9 au lait", "sub/c.bin": b"ok\0", "sub/end.txt": b"ok \xc3"}
    (folder / "sub").mkdir()
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    return bad


def test_what_is_not_text_is_left_out_and_named_and_the_rest_is_as_without_it(tmp_path):
    folder, cache = tmp_path / "text", tmp_path / "cache"
    folder.mkdir()
    bad = some_are_not_text(folder)
    found, read = corpora.load(str(folder), cache), corpora.read(str(folder))
    assert "4 of 84 files left out, which are not UTF-8 text: a.png, b.txt, sub/c.bin and 1 more" in found.describe()
    assert str(read) in found.describe()
    assert found.parts["train"].left_out == {
        "a.png": "binary",
        "b.txt": "not UTF-8 (byte 0xe9 at offset 3)",
        "sub/c.bin": "binary",
        "sub/end.txt": "not UTF-8 (byte 0xc3 at offset 3)",
    }
    for name in bad:
        (folder / name).unlink()
    clean = corpora.load(str(folder), cache)
    assert "left out" not in clean.describe()
    assert (clean.digest, documents(clean)) == (found.digest, documents(found))
    assert corpora.read(str(folder)).parts == read.parts


def test_strict_refuses_and_lists_all_at_once(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    bad = some_are_not_text(folder)
    for read in (corpora.read, corpora.split, lambda *args, **how: corpora.load(args[0], tmp_path / "cache", **how)):
        with pytest.raises(InputError, match="4 of 84 files are not UTF-8 text") as error:
            read(str(folder), strict=True)
        assert all(name in str(error.value) for name in bad)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_where_no_text_is_left_it_is_refused(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.bin").write_bytes(b"\0")
    with pytest.raises(InputError, match="it holds no text, 5 of 5 files left out, which are not UTF-8") as error:
        corpora.read(str(tmp_path))
    assert "0.bin, 1.bin, 2.bin and 2 more" in str(error.value)


def test_links_pipes_hidden_and_empty_files(tmp_path):
    folder = tmp_path / "text"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("hidden")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("linked\n")
    (folder / "b.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    (folder / "c").symlink_to(tmp_path / "elsewhere")  # a folder, which could be its own parent
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    (folder / "empty.txt").touch()
    os.mkfifo(folder / "pipe")
    (folder / "a.txt").write_text("text\n")
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("a name of another time\n")
    found = corpora.read(str(folder), strict=True)
    assert sorted(part.name for part in found.parts) == ["a.txt", "b.txt", "caf\\xe9.txt"]
    assert found.files == 4
    os.mkfifo(tmp_path / "alone")
    with pytest.raises(InputError, match="is neither a file nor a folder"):
        corpora.read(str(tmp_path / "alone"))


def test_each_file_is_opened_twice_at_most_and_the_prepared_text_is_read_at_once(tmp_path, monkeypatch):
    """One look for what it holds and one for its text: a folder of many small files takes seconds."""
    folder, opened = tmp_path / "text", collections.Counter()
    folder.mkdir()
    for i in range(100):
        (folder / f"{i}.txt").write_text(f"text {i}\n" * 20)
    opens = Path.open

    def counted(path, *args, **how):
        opened[path.name] += path.parent == folder
        return opens(path, *args, **how)

    monkeypatch.setattr(Path, "open", counted)
    dataset.prepare(str(folder), tmp_path / "cache", vocabulary=270, length=16, batch=2)
    assert {opened[f"{i}.txt"] for i in range(100)} == {2}
