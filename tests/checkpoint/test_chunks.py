"""Files in chunks: cut where they should be, hashed whatever the pieces are, written before they count."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import xxhash

from distopt.checkpoint import chunks
from distopt.checkpoint.chunks import by_chunk, chunk_digest, read_small, thread_pool, write_file
from distopt.checkpoint.errors import CorruptCheckpointError
from distopt.checkpoint.storage.base import open_storage


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 10)


@pytest.mark.parametrize("seed", range(20))
def test_chunks_are_cut_at_their_multiples_whatever_the_pieces_and_the_offset(seed, small_chunks):
    chance = random.Random(seed)
    raw = chance.randbytes(chance.randint(0, 95))
    cuts = sorted(chance.sample(range(len(raw) + 1), min(len(raw), chance.randint(0, 8))))
    bounds = zip([0, *cuts], [*cuts, len(raw)], strict=True)
    offset = chance.randint(0, 25)
    split = list(by_chunk([memoryview(raw)[start:stop] for start, stop in bounds], offset))
    assert b"".join(bytes(piece) for _, chunk in split for piece in chunk) == raw
    indices = [index for index, _ in split]
    assert indices == list(range(offset // 10, offset // 10 + len(split)))
    ends = offset
    for index, chunk in split:
        ends += sum(map(len, chunk))
        assert ends <= (index + 1) * 10
        assert ends == (index + 1) * 10 or index == indices[-1]


def test_pieces_of_wider_items_count_by_their_bytes(small_chunks):
    split = list(by_chunk([memoryview(bytes(24)).cast("d")]))
    assert [(index, sum(map(len, chunk))) for index, chunk in split] == [(0, 10), (1, 10), (2, 4)]


def test_digest_is_that_of_the_bytes_however_they_are_cut():
    raw = random.Random(0).randbytes(1000)
    expected = xxhash.xxh3_128_hexdigest(raw)
    view = memoryview(raw)
    assert chunk_digest([view]) == chunk_digest([view[:1], view[1:1], view[1:]]) == expected


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 100])
def test_file_when_written_has_a_record_of_its_size_and_chunks(size, small_chunks, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "SMALL_BYTES", 5)  # so that threads hash, too
    raw = random.Random(size).randbytes(size)
    storage = open_storage(tmp_path)
    with thread_pool() as pool:
        record = write_file(storage.create("", "file"), [memoryview(raw)], pool)
    assert (tmp_path / "file").read_bytes() == raw
    assert record.size == size
    assert record.chunks == tuple(xxhash.xxh3_128_hexdigest(raw[start : start + 10]) for start in range(0, size, 10))


def test_file_whose_pieces_fail_is_abandoned_and_the_error_raised(tmp_path):
    storage, done = open_storage(tmp_path), []

    def pieces():
        yield memoryview(b"first")
        raise OSError("the disk is gone")

    stream = storage.create("", "file")
    abandon = stream.abandon
    stream.abandon = lambda: (done.append("abandoned"), abandon())
    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="the disk is gone"):
        write_file(stream, pieces(), pool)
    assert done == ["abandoned"]


def test_small_file_is_read_whole_unless_it_is_larger_than_allowed(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    storage = open_storage(tmp_path)
    assert read_small(storage, "", "file", 5) == b"12345"
    with pytest.raises(CorruptCheckpointError, match="file: 5 bytes, limit 4"):
        read_small(storage, "", "file", 4)
    with pytest.raises(FileNotFoundError):
        read_small(storage, "", "other", 5)
