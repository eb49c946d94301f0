import pytest

from efflm.config import InputError
from efflm.data import corpora


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
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (85, 5, 10)
    again = corpora.load(str(folder), tmp_path / "cache")
    assert again == corpus


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
    name, found = corpora._read(corpora.DEFAULT)
    names = {document for document, _ in found}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not [n for n in names if set(n.split("/")) & corpora.LEFT_OUT]
    assert sum(len(text) for _, text in found) > 5_000_000
    assert "library" in name


def test_text_to_score_is_whole_files_or_pieces_of_one(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n" * 10)
    name, count, found = corpora.read(str(tmp_path), documents=3)
    assert (name, count, len(found)) == (str(tmp_path), 5, 3)
    assert all(text == f"text {name[0]}\n" * 10 for name, text in found)
    assert found == corpora.read(str(tmp_path))[2][:3]  # a sample that does not depend on its size
    (tmp_path / "0.txt").write_text("line\n" * 10_000)
    _, count, found = corpora.read(str(tmp_path / "0.txt"))
    assert count == len(found) == 4
    assert sorted(text for _, text in found) == sorted(
        text for _, text in corpora._pieces([("", "line\n" * 10_000)], 16384)
    )


def test_held_out_documents_are_those_of_the_test_split(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(5000)))
    name, count, found = corpora.held_out(str(path))
    whole = corpora.load(str(path), tmp_path / "cache")
    assert (name, count, found) == (whole.name, len(whole.test), whole.test)
    assert corpora.held_out(str(path), 2)[1:] == (count, whole.test[:2])
