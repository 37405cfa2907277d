"""The hash behind proved.txt. Whether the tree has that hash is not asked here: .ci/run runs the proof if not."""

import pytest

from csrc import proof


@pytest.fixture
def tree(tmp_path):
    for name in ("csrc/kernels/a.cu", "csrc/bind/b.cpp", "tests/csrc/checks/a.cpp", "CMakeLists.txt", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"of {name}\n")
    return tmp_path


def test_the_real_tree_is_hashed():
    names = {path.relative_to(proof.ROOT).as_posix() for path in proof.files(proof.ROOT)}
    assert {
        "CMakeLists.txt",
        "csrc/bind/check.h",
        "csrc/kernels/primitives/mma.cuh",
        "tests/csrc/survivors.txt",
    } <= names
    assert "tests/csrc/proved.txt" not in names
    assert not [name for name in names if name.endswith(".pyc")]


@pytest.mark.parametrize("name", ["csrc/kernels/a.cu", "csrc/bind/b.cpp", "tests/csrc/checks/a.cpp", "CMakeLists.txt"])
def test_a_byte_that_changes_changes_it(tree, name):
    before = proof.tree_hash(tree)
    text = (tree / name).read_bytes()
    (tree / name).write_bytes(text[:-1] + b"!")
    assert proof.tree_hash(tree) != before
    (tree / name).write_bytes(text)
    assert proof.tree_hash(tree) == before


def swallow(file, following, tree):
    """One file less, with all names and contents one after the other as before."""
    file.write_text(file.read_text() + following + (tree / following).read_text())
    (tree / following).unlink()


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: (tree / "csrc/kernels/a.cu").rename(tree / "csrc/kernels/b.cu"),
        lambda tree: (tree / "csrc/kernels/a.cu").rename(tree / "csrc/a.cu"),
        lambda tree: (tree / "csrc/kernels/new.cuh").touch(),
        lambda tree: (tree / "csrc/kernels/a.cu").unlink(),
        lambda tree: swallow(tree / "csrc/bind/b.cpp", "csrc/kernels/a.cu", tree),
    ],
    ids=["renamed", "moved", "added", "removed", "swallowed"],
)
def test_other_files_change_it(tree, change):
    before = proof.tree_hash(tree)
    change(tree)
    assert proof.tree_hash(tree) != before


def test_what_is_no_source_does_not_change_it(tree):
    before = proof.tree_hash(tree)
    (tree / "csrc" / "__pycache__").mkdir()
    (tree / "csrc" / "__pycache__" / "a.pyc").touch()
    (tree / "README.md").write_text("new")
    (tree / "csrc" / "README.md").write_text("prose proves nothing")
    (tree / "tests" / "test_other.py").write_text("new")
    proof.write(before, tree)
    assert proof.tree_hash(tree) == before == proof.proved(tree)


def test_a_proof_of_other_sources_is_not_written(tree):
    tested = proof.tree_hash(tree)
    (tree / "csrc" / "kernels" / "a.cu").write_text("edited while the tests ran")
    with pytest.raises(SystemExit, match=f"{tested}.*{proof.tree_hash(tree)}"):
        proof.write(tested, tree)
    assert proof.proved(tree) == ""


def test_check_tells_by_its_exit_status(tree, monkeypatch, capsys):
    monkeypatch.setattr(proof, "tree_hash", lambda: "1")
    monkeypatch.setattr(proof, "proved", lambda: "1")
    proof.main("check")
    proof.main("hash")
    assert capsys.readouterr().out.splitlines()[1:] == ["1"]
    monkeypatch.setattr(proof, "proved", lambda: "2")
    with pytest.raises(SystemExit) as refused:
        proof.main("check")
    assert refused.value.code not in (0, None)
