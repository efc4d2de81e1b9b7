"""Files under URIs: whole or absent, won by one writer, local and remote alike."""

import errno
import os
import threading

import pytest

from data_service import storage
from data_service.errors import ConfigError


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


def test_a_moved_file_replaces_and_sizes_are_listed(root):
    source, target = storage.join(root, "work", "a"), storage.join(root, "done", "b")
    storage.write_bytes(source, b"12345")
    storage.write_bytes(target, b"x")
    storage.move_file(source, target)
    assert storage.read_bytes(target) == b"12345"
    assert not storage.exists(source)
    assert storage.list_sizes(storage.join(root, "done")) == {"b": 5}
    assert storage.list_sizes(storage.join(root, "nowhere")) == {}


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links_is_named(tmp_path, monkeypatch, code):
    def refuse(source, target):
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    monkeypatch.setattr(os, "link", refuse)  # what vfat and some network mounts answer
    with pytest.raises(ConfigError, match=r"manifest\.json .*\(\w+ on /.*\) makes no hard links"):
        storage.put_if_absent(str(tmp_path / "manifest.json"), b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["gs://bucket/run/manifest.json", "sftp://host/run/manifest.json"])
def test_stores_without_an_exclusive_create_take_no_commits(uri):
    with pytest.raises(ConfigError, match=r"(gs|sftp):// is not known to refuse a second writer.*s3://"):
        storage.put_if_absent(uri, b"x")
