from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurmeval.manifest import (
    Entry,
    UnsafePath,
    compare,
    destination,
    parse_listing,
    read_record,
    write_atomic,
    write_record,
)

NAME = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name)


@given(st.dictionaries(NAME, st.integers(0, 2**40), max_size=5), st.sets(NAME, max_size=3))
def test_a_listing_of_any_names_is_read(files: dict[bytes, int], links: set[bytes]) -> None:
    digest = hashlib.sha256().hexdigest().encode()
    stats = b"".join(b"f %d ./%s\0" % (size, name) for name, size in files.items())
    stats += b"".join(b"l 0 ./%s\0" % name for name in links)
    sums = b"".join(b"%s  ./%s\0" % (digest, name) for name in files)
    listing = parse_listing(stats + b"\0" + sums)
    found = {e.path.encode("utf-8", "surrogateescape"): e.size for e in listing.files}
    assert found == files
    assert {link.encode("utf-8", "surrogateescape") for link in listing.symlinks} == links
    assert {e.sha256 for e in listing.files} <= {digest.decode()}


def test_a_file_without_a_checksum_has_none() -> None:
    assert parse_listing(b"f 3 ./a\0\0").files == [Entry("a", 3, "")]


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/..", "../a", "/a", "a/../../b", "a\0b", ".pulled.json", ".incoming-1/x"],
)
def test_names_that_lead_out_or_are_taken(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafePath):
        destination(tmp_path, name)


@given(st.text(max_size=30))
def test_every_destination_lies_inside(name: str) -> None:
    root = Path("/no/such/root")
    try:
        path = destination(root, name)
    except UnsafePath:
        return
    assert path.resolve().is_relative_to(root)
    assert path != root


def entry(path: str, data: bytes) -> Entry:
    return Entry(path, len(data), hashlib.sha256(data).hexdigest())


def test_three_states_decide(tmp_path: Path) -> None:
    for name, data in {"same": b"1", "older": b"1", "mine": b"2", "own": b"x"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("same")
    pulled = {
        name: (0, 0, hashlib.sha256(b"1").hexdigest())
        for name in ("same", "older", "mine", "gone", "link")
    }
    new = [entry(name, b"3") for name in ("older", "mine", "own", "gone", "folder", "link", "new")]
    plan = compare([entry("same", b"1"), *new], tmp_path, pulled)
    assert [e.path for e in plan.unchanged] == ["same"]
    assert [e.path for e in plan.move] == ["older", "gone", "new"]
    assert [e.path for e in plan.kept] == ["mine", "own", "folder", "link"]


def test_the_record_comes_back_and_a_broken_one_is_none(tmp_path: Path) -> None:
    record = {"odd\udcff\nname": (1, 2, "abc")}
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    for text in ("", "{", "[1]", '{"a": 1}', '{"a": [1]}', '{"a": ["x", 2, "y"]}'):
        (tmp_path / ".pulled.json").write_text(text)
        assert read_record(tmp_path) == {}


def test_an_atomic_write_is_private_and_leaves_no_trace(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x").write_text("old")
    write_atomic(folder / "x", "new")
    assert (folder / "x").read_text() == "new"
    assert (folder / "x").stat().st_mode & 0o777 == 0o600
    assert list(folder.iterdir()) == [folder / "x"]
