"""A place of whole files, on a disk and in a store."""

import pytest

from cpt_jax.core.place import Place


@pytest.fixture(params=["local", "store"])
def place(request, tmp_path):
    return Place(tmp_path / "out" if request.param == "local" else f"memory://{tmp_path.name}/out")


def test_files_come_back_by_their_names_and_go(place):
    assert place.names() == []
    assert (place.read("a"), place.size("a")) == (None, None)
    place.write("a", b"one")
    place.write("deep/b", b"")
    assert place.names() == ["a", "deep/b"]
    assert (place.read("a"), place.size("a")) == (b"one", 3)
    assert (place.read("deep/b"), place.size("deep/b")) == (b"", 0)
    with place.local(["a", "deep/b"]) as files:
        assert [file.read_bytes() for file in files] == [b"one", b""]
    place.remove("deep")
    place.remove("not there")
    assert place.names() == ["a"]
    place.remove("a")
    assert place.names() == []


def test_a_file_that_was_not_written_to_its_end_is_not_there_and_the_one_before_it_stays(place):
    with place.written("deep/a") as path:
        path.write_bytes(b"whole")
        assert place.names() in ([], ["deep/a.partial"]), "it has no name yet"
    assert (place.read("deep/a"), place.names()) == (b"whole", ["deep/a"])
    with pytest.raises(RuntimeError), place.written("deep/a") as path:
        path.write_bytes(b"ha")
        raise RuntimeError
    assert (place.read("deep/a"), place.names()) == (b"whole", ["deep/a"])


def test_a_file_that_is_gone_is_no_empty_one(place):
    place.write("a", b"one")
    with pytest.raises(FileNotFoundError), place.local(["a", "gone"]) as files:
        for file in files:
            file.read_bytes()
