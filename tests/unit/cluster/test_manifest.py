from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurmeval.manifest import (
    Doubt,
    Entry,
    Known,
    Listing,
    Plan,
    Root,
    UnsafePath,
    compare,
    differing,
    parse_entry,
    read_record,
    results_manifest,
    write_atomic,
    write_record,
)

NAME = st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name)


@given(NAME, st.integers(0, 2**40), st.integers(0, 2**62), st.booleans())
def test_any_entry_is_read(name: bytes, size: int, mtime_ns: int, link: bool) -> None:
    seconds = b"%d.%09d0" % divmod(mtime_ns, 10**9)
    found = parse_entry(b"%s %d %s ./%s" % (b"l" if link else b"f", size, seconds, name))
    assert found == (link, Entry(name.decode("utf-8", "surrogateescape"), size, mtime_ns))


@pytest.mark.parametrize(("seconds", "ns"), [(b"5", 5 * 10**9), (b"5.25", 5_250_000_000)])
def test_times_of_any_precision(seconds: bytes, ns: int) -> None:
    assert parse_entry(b"f 1 %s ./x" % seconds)[1].mtime_ns == ns


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/..",
        "../a",
        "/a",
        "a/../../b",
        "a\0b",
        "a//b",
        "a/./b",
        "a/",
        ".pulled.json",
    ],
)
def test_names_that_lead_out_or_are_taken(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafePath):
        Root(tmp_path).find(name)


def test_names_that_a_pull_uses_itself(tmp_path: Path) -> None:
    for name in (".pulled.json", ".pulled.json/x", ".incoming/x", ".incoming-1"):
        with pytest.raises(UnsafePath):
            Root(tmp_path).find(name)


def test_a_link_that_leads_out(tmp_path: Path) -> None:
    (tmp_path / "root" / "in").mkdir(parents=True)
    (tmp_path / "root" / "out").symlink_to("..")
    (tmp_path / "root" / "also").symlink_to("in")
    root = Root(tmp_path / "root")
    with pytest.raises(UnsafePath):
        root.find("out/x")
    assert root.find("also/x") == (str(tmp_path / "root" / "also" / "x"), False)


@given(st.text(max_size=30))
def test_every_place_lies_inside(name: str) -> None:
    root = Path("/no/such/root")
    try:
        path = Path(Root(root).find(name)[0])
    except UnsafePath:
        return
    assert Root(root).path(name) == str(path)
    assert path.resolve().is_relative_to(root)
    assert path != root
    assert str(path.relative_to(root)) == name


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_three_states_decide(tmp_path: Path) -> None:
    here = {"same": b"1", "touched": b"1", "longer": b"1", "mine": b"2", "mine too": b"22"}
    for name, data in {**here, "own": b"x", "own too": b"xx"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("same")
    pulled = {
        name: Known(1, 5, (tmp_path / name).stat().st_mtime_ns, digest(b"1"))
        for name in ("same", "touched", "longer")
    }
    pulled |= {name: Known(1, 5, 5, digest(b"1")) for name in ("mine", "mine too", "gone", "link")}
    sizes = {"longer": 2}
    names = [*here, "own", "own too", "gone", "folder", "link", "new"]
    entries = [Entry(n, sizes.get(n, 1), 5 if n == "same" else 6) for n in names]
    plan = compare(entries, Root(tmp_path), pulled, cheap=0)
    assert [e.path for e in plan.unchanged] == ["same"]
    assert [e.path for e in plan.move] == ["longer", "gone", "new"]
    assert [e.path for e in plan.kept] == ["mine too", "own too", "folder", "link"]
    assert [(d.entry.path, d.sha256, d.pristine) for d in plan.doubts] == [
        ("touched", digest(b"1"), True),
        ("mine", digest(b"2"), False),
        ("own", digest(b"x"), False),
    ]
    eager = compare(entries, Root(tmp_path), pulled, cheap=2)
    assert [e.path for e in eager.move] == ["touched", "longer", "gone", "new"]
    assert [d.entry.path for d in eager.doubts] == ["mine", "own"]
    assert eager.kept == plan.kept


@pytest.mark.parametrize(
    ("pristine", "remote", "where"),
    [
        (True, "a", "unchanged"),
        (False, "a", "unchanged"),
        (True, "b", "move"),
        (True, None, "move"),
        (False, "b", "kept"),
        (False, None, "kept"),
    ],
)
def test_a_checksum_settles_a_doubt(pristine: bool, remote: str | None, where: str) -> None:
    plan, entry = Plan(), Entry("x", 1, 1)
    assert plan.settle(Doubt(entry, "a", pristine), remote) == (where == "unchanged")
    assert {name for name in ("unchanged", "move", "kept") if getattr(plan, name)} == {where}


@pytest.mark.parametrize(("age", "remembered"), [(3, True), (1, False), (0, False), (-9, False)])
def test_the_time_of_a_file_that_was_just_written_is_not_trusted(
    age: int, remembered: bool
) -> None:
    now = 10**18
    entry = Entry("x", 1, now - age * 10**9)
    known = Listing([entry], [], now, True).known(entry, 7, "a")
    assert known == Known(1, entry.mtime_ns if remembered else -1, 7, "a")


def test_what_the_job_says_it_wrote(tmp_path: Path) -> None:
    assert results_manifest(tmp_path) == {}
    file = tmp_path / "eval_results" / "manifest.json"
    file.parent.mkdir()
    for text in ("", "[]", '{"files": 1}', '{"files": {"a": {}}}', '{"files": {"a": 1}}'):
        file.write_text(text)
        assert results_manifest(tmp_path) == {}
    file.write_text('{"files": {"t/a": {"size": 1, "sha256": "1"}, "b": {"sha256": "2"}}}')
    expected = results_manifest(tmp_path)
    assert expected == {"eval_results/t/a": "1", "eval_results/b": "2"}
    pulled = {"eval_results/t/a": Known(1, 1, 1, "1"), "eval_results/b": Known(1, 1, 1, "x")}
    assert differing(expected, pulled) == ["eval_results/b"]
    assert differing(expected, {}) == ["eval_results/b", "eval_results/t/a"]


def test_the_record_comes_back_and_a_broken_one_is_none(tmp_path: Path) -> None:
    record = {"odd\udcff\nname": Known(1, 2, 3, "abc")}
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    for text in (
        "",
        "{",
        "[1]",
        '{"a": 1}',
        '{"a": [1]}',
        '{"a": ["x", 2, 3, "y"]}',
        '{"a": [1, 2, "y"]}',
    ):
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
