"""Files under URIs: whole or absent, won by one writer, local and remote alike."""

import threading

import pytest

from data_service import storage


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    uri = str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}"
    yield uri
    storage.remove_tree(uri)


def test_write_read_list_and_remove(root):
    uri = storage.join(root, "a", "b.bin")
    assert not storage.exists(uri)
    assert storage.list_names(root) == []
    storage.write_bytes(uri, b"0123456789")
    storage.write_bytes(storage.join(root, "a", "a.bin"), b"")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_range(uri, 3, 4) == b"3456"
    assert storage.read_range(uri, 8, 100) == b"89"
    assert storage.file_size(uri) == 10
    assert storage.list_names(storage.join(root, "a")) == ["a.bin", "b.bin"]
    with storage.open_input(uri) as stream:
        assert stream.read(2) == b"01"
        assert stream.readline(3) == b"234"
        assert stream.seek(0) == 0
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    assert [name.rpartition("/")[2] for name in storage.glob_files(storage.join(root, "a", "[ab].bin"))] == [
        "a.bin",
        "b.bin",
    ]
    storage.remove_file(uri)
    storage.remove_file(uri)
    assert storage.list_names(storage.join(root, "a")) == ["a.bin"]
    storage.remove_tree(root)
    storage.remove_tree(root)
    assert not storage.exists(storage.join(root, "a", "a.bin"))
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(uri)


def test_of_many_writers_one_wins(root):
    uri = storage.join(root, "manifest.json")
    won = []
    barrier = threading.Barrier(8)

    def write(number):
        barrier.wait()
        if storage.put_if_absent(uri, str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(uri) == str(won[0]).encode()
    assert storage.list_names(root) == ["manifest.json"]


def test_a_write_that_fails_leaves_what_was_there(root):
    uri = storage.join(root, "file")
    storage.write_bytes(uri, b"old")

    def fail():
        with storage.publish(uri) as stream:
            stream.write(b"half of the n")
            raise RuntimeError("the writer died")

    with pytest.raises(RuntimeError, match="the writer died"):
        fail()
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_names(root) == ["file"]
