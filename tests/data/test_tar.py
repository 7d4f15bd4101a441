"""Tar shards: what is read in place, and that whatever is wrong with a member costs that member alone."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from odd_images import encode, picture
from s3 import s3_storage
from test_index import paths, read
from web import web_server

from pipeline.data.index import Index
from pipeline.data.indexing.build import IndexReport, build_index
from pipeline.errors import UserError

IMAGES = [encode(picture(20 + k, 30, seed=k), "JPEG") for k in range(8)]
Content = bytes | tarfile.TarInfo


def shard(file: Path, members: list[tuple[str, Content]], form: int = tarfile.USTAR_FORMAT) -> Path:
    """Write a tar file; a member is its bytes, or a header of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            data = content if isinstance(content, bytes) else b""
            info.size = len(data) or info.size
            tar.addfile(info, io.BytesIO(data) if data else None)
    return file


def numbered(*labels: int | None) -> list[tuple[str, Content]]:
    """Samples 0.jpg, 0.cls, 1.jpg, ..."""
    members: list[tuple[str, Content]] = []
    for k, label in enumerate(labels):
        members.append((f"{k}.jpg", IMAGES[k]))
        if label is not None:
            members.append((f"{k}.cls", str(label).encode()))
    return members


def reasons(report: IndexReport) -> dict[str, str]:
    """By member."""
    return {one.path.rpartition("#")[2]: one.reason for one in report.refused}


def names(index: Index) -> list[str]:
    return [path.rpartition("#")[2] for path in paths(index)]


def test_members_are_read_in_place(tmp_path: Path) -> None:
    shard(tmp_path / "b" / "1.tar", numbered(2, 0))
    shard(tmp_path / "0.tar", numbered(1))
    index, report = build_index(tmp_path)
    assert report.refused == []
    assert paths(index) == ["0.tar#0.jpg", "b/1.tar#0.jpg", "b/1.tar#1.jpg"]
    assert [read(index, row) for row in range(3)] == [IMAGES[0], IMAGES[0], IMAGES[1]]
    assert (index.classes, index.labels.tolist()) == (("0", "1", "2"), [1, 2, 0])
    assert (index.heights.tolist(), set(index.widths)) == ([20, 20, 21], {30})


def test_patterns_and_single_shards(tmp_path: Path) -> None:
    for k in range(3):
        shard(tmp_path / f"train-{k:03}.tar", numbered(k))
    index, _ = build_index(f"{tmp_path}/train-{{001..002}}.tar")
    assert paths(index) == ["train-001.tar#0.jpg", "train-002.tar#0.jpg"]
    assert paths(build_index(tmp_path / "train-000.tar")[0]) == ["train-000.tar#0.jpg"]


def test_shards_on_a_web_server(tmp_path: Path) -> None:
    """By a pattern, which needs no listing; with blanks; and over a connection that breaks in the middle."""
    for k in range(2):
        shard(tmp_path / "my shards" / f"x-{k}.tar", numbered(k, 1))
    local, _ = build_index(tmp_path / "my shards")
    with web_server(tmp_path) as server:
        server.cuts = 1
        index, report = build_index((server.storage / "my shards").uri + "/x-{0..1}.tar")
        assert report.refused == []
        assert paths(index) == paths(local)
        assert index.fingerprint == local.fingerprint
        with pytest.raises(UserError, match=r"my%20shards lacks a file that should be there: .*x-2\.tar"):
            build_index((server.storage / "my shards").uri + "/x-{1..2}.tar")


def test_shards_on_s3(tmp_path: Path) -> None:
    with s3_storage() as bucket:
        for k in range(2):
            (bucket / "deep" / "er").upload(shard(tmp_path / f"x-{k}.tar", numbered(k, 1)), f"x-{k}.tar")
        local, _ = build_index(tmp_path)
        uri, _, query = (bucket / "deep" / "er").uri.partition("?")
        index, _ = build_index(f"{uri}/x-{{0..1}}.tar?{query}")
        assert (paths(index), index.fingerprint) == (paths(local), local.fingerprint)
        assert read(index, 3) == IMAGES[1]
        assert paths(build_index((bucket / "deep").uri)[0]) == [f"er/{path}" for path in paths(local)]


def test_labels_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    members: list[tuple[str, Content]] = [
        ("cls.jpg", IMAGES[0]),
        ("cls.cls", b"2\n"),
        ("cls.json", b'{"label": 0}'),  # the .cls goes before it
        ("json.json", b'{"class": "bee", "label": 0}'),  # the label goes before the class
        ("json.jpg", IMAGES[1]),
        ("word.jpg", IMAGES[2]),
        ("word.cls", b"bee"),
        ("ant/folder.jpg", IMAGES[3]),
        ("ant/folder.json", b'{"class": "cat"}'),
        ("high.jpg", IMAGES[4]),
        ("high.cls", b"3"),
        ("other.jpg", IMAGES[5]),
        ("other.cls", b"dog"),
    ]
    index, report = build_index(shard(tmp_path / "x.tar", members))
    assert names(index) == ["cls.jpg", "json.jpg", "word.jpg", "ant/folder.jpg"]
    assert [index.classes[k] for k in index.labels] == ["cat", "ant", "bee", "cat"]
    assert reasons(report) == {
        "high.jpg": "label 3 is not among the classes",
        "other.jpg": "label 'dog' is not among the classes",
    }


def test_a_class_named_twice_is_refused(tmp_path: Path) -> None:
    """Labels of two classes of one name would become one where validation takes the training's numbers."""
    (tmp_path / "classes.txt").write_text("crane\nbee\ncrane\n")
    with pytest.raises(UserError, match=r"classes\.txt names the class 'crane' twice"):
        build_index(shard(tmp_path / "x.tar", numbered(0)))


def test_the_folder_in_the_key_is_the_class_where_there_are_no_labels(tmp_path: Path) -> None:
    members: list[tuple[str, Content]] = [("./train/dog/1.jpg", IMAGES[0]), ("train/ant/1.jpg", IMAGES[1])]
    index, report = build_index(shard(tmp_path / "x.tar", [*members, ("top.jpg", IMAGES[2])]))
    assert (index.classes, index.labels.tolist()) == (("ant", "dog"), [1, 0])
    assert reasons(report) == {"top.jpg": "no label"}


def test_names_and_numbers_do_not_mix(tmp_path: Path) -> None:
    members: list[tuple[str, Content]] = [*numbered(3), ("b.jpg", IMAGES[1]), ("b.cls", b"dog")]
    with pytest.raises(
        UserError, match=r"both names and numbers for labels, such as 'dog' \(x\.tar b\.jpg\) and 3 .*classes\.txt"
    ):
        build_index(shard(tmp_path / "x.tar", members))


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (b"", "no label"),
        (b"-1", "label -1 is not a class number"),
        (b"99999999999", "label 99999999999 is not a class number"),
        (b"\xff\xfe", "its .cls is not readable"),
    ],
)
def test_odd_labels_are_refused(tmp_path: Path, label: bytes, reason: str) -> None:
    index, report = build_index(shard(tmp_path / "x.tar", [*numbered(0), ("x.jpg", IMAGES[1]), ("x.cls", label)]))
    assert names(index) == ["0.jpg"]
    assert reason in reasons(report)["x.jpg"]


@pytest.mark.parametrize("content", [b"{", b'{"label": null}', b'{"label": true}', b'{"label": {"a": 1}}', b"[" * 9999])
def test_odd_json_is_refused(tmp_path: Path, content: bytes) -> None:
    index, report = build_index(shard(tmp_path / "x.tar", [*numbered(0), ("x.jpg", IMAGES[1]), ("x.json", content)]))
    assert names(index) == ["0.jpg"]
    assert set(reasons(report)) == {"x.jpg"}


def test_a_missing_label_and_a_second_image_cost_themselves_alone(tmp_path: Path) -> None:
    again: list[tuple[str, Content]] = [("0.png", encode(picture(), "PNG")), ("0.cls", b"5")]
    index, report = build_index(shard(tmp_path / "x.tar", [*numbered(0, None, 1), *again]))
    assert (names(index), index.labels.tolist()) == (["0.jpg", "2.jpg"], [0, 1])
    assert reasons(report) == {"1.jpg": "no label", "0.png": "a second image of the key 0"}


def header(kind: bytes, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname, info.size = kind, link, size
    return info


def test_members_that_are_not_plain_files_are_refused(tmp_path: Path) -> None:
    odd: list[tuple[str, Content]] = [
        ("folder", header(tarfile.DIRTYPE)),
        ("soft.jpg", header(tarfile.SYMTYPE, "0.jpg")),
        ("hard.jpg", header(tarfile.LNKTYPE, "0.jpg")),
        ("pipe.jpg", header(tarfile.FIFOTYPE)),
        ("../up.jpg", IMAGES[3]),
        ("a/../../up.cls", b"1"),
        ("/absolute.jpg", IMAGES[4]),
        ("._0.jpg", b"Apple's"),
        ("9.seg.png", b"something else of the sample"),
        ("9.jpg", IMAGES[5]),
        ("9.cls", b"1"),
        ("n01.5.jpg", IMAGES[6]),
        ("text.jpg", b"no image"),
        ("text.cls", b"0"),
    ]
    members = numbered(0, 1)
    index, report = build_index(shard(tmp_path / "x.tar", [*members[:2], *odd, *members[2:]]))
    assert names(index) == ["0.jpg", "9.jpg", "1.jpg"]
    assert {name: reason.split(";")[0] for name, reason in reasons(report).items()} == {
        "soft.jpg": "a link, to 0.jpg",
        "hard.jpg": "a link, to 0.jpg",
        "pipe.jpg": "not a file",
        "../up.jpg": "its path is absolute or has '..' in it",
        "a/../../up.cls": "its path is absolute or has '..' in it",
        "/absolute.jpg": "its path is absolute or has '..' in it",
        "n01.5.jpg": "its key ends at the first dot, so 'n01' has no image",
        "text.jpg": "not an image in a known format",
    }


def test_a_sparse_member_is_refused_and_what_follows_is_kept(tmp_path: Path) -> None:
    """GNU's old sparse header, as `tar --sparse` writes it: one block of data at 512 of 4096."""
    info = header(tarfile.GNUTYPE_SPARSE)
    info.name, info.size = "1.jpg", 512
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (512, 512)
    block[483:495] = b"%011o\0" % 4096
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    whole = shard(tmp_path / "x.tar", numbered(0, None, 1)).read_bytes()
    place = whole.index(b"1.jpg\0")
    end = whole.index(b"2.jpg\0")
    (tmp_path / "x.tar").write_bytes(whole[:place] + bytes(block) + bytes(512) + whole[end:])
    index, report = build_index(tmp_path)
    assert names(index) == ["0.jpg", "2.jpg"]
    assert "a sparse file" in reasons(report)["1.jpg"]
    assert read(index, 1) == IMAGES[2]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_gnu_and_pax(tmp_path: Path, form: int) -> None:
    long = "x" * 80 + "/" + "ä" * 90
    info = tarfile.TarInfo()
    info.pax_headers = {"comment": "hello"}
    members: list[tuple[str, Content]] = [(f"{long}.jpg", IMAGES[0]), (f"{long}.cls", b"1"), ("y.txt", info)]
    index, report = build_index(shard(tmp_path / "x.tar", [*members, *numbered(0)], form))
    assert report.refused == []
    assert names(index) == [f"{long}.jpg", "0.jpg"]
    assert [read(index, row) for row in (0, 1)] == [IMAGES[0], IMAGES[0]]


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    file = shard(tmp_path / "x.tar", [*numbered(0), ("\udcff.jpg", IMAGES[1]), ("\udcff.cls", b"0")])
    index, report = build_index(file)
    assert names(index) == ["0.jpg"]
    assert reasons(report) == {r"\udcff.jpg": "the name is not UTF-8; rename it"}


def test_a_shard_cut_off_in_a_member(tmp_path: Path) -> None:
    file = shard(tmp_path / "x.tar", numbered(0, 1, 2))
    whole = file.read_bytes()
    start = whole.index(IMAGES[2])
    file.write_bytes(whole[: start + 200])
    shard(tmp_path / "y.tar", numbered(3))
    index, report = build_index(tmp_path)
    assert paths(index) == ["x.tar#0.jpg", "x.tar#1.jpg", "y.tar#0.jpg"]
    assert reasons(report) == {"2.jpg": f"cut off: 200 of {len(IMAGES[2])} bytes are there"}


def test_a_shard_cut_off_between_members_or_in_a_header(tmp_path: Path) -> None:
    file = shard(tmp_path / "x.tar", numbered(0, 1))
    whole = file.read_bytes()
    place = whole.index(b"1.jpg\0")
    for cut in (place, place + 100):
        file.write_bytes(whole[:cut])
        index, report = build_index(tmp_path)
        assert names(index) == ["0.jpg"]
        (one,) = report.refused
        assert str(one) == f"{file}: cut off: it ends at byte {place} without the mark of a tar file's end"


@pytest.mark.parametrize("missing", [0, 700, 512])
def test_damage_in_the_middle_costs_what_it_covers(tmp_path: Path, missing: int) -> None:
    """A member's header is overwritten, and bytes of its content are lost, so that later headers lie elsewhere."""
    file = shard(tmp_path / "x.tar", numbered(0, 1, 2))
    whole = file.read_bytes()
    place = whole.index(b"1.jpg\0")
    file.write_bytes(whole[:place] + b"garbage!" * 64 + whole[place + 512 + missing :])
    index, report = build_index(tmp_path)
    assert names(index) == ["0.jpg", "2.jpg"]
    assert [read(index, row) for row in (0, 1)] == [IMAGES[0], IMAGES[2]]
    (one,) = report.refused
    assert f"damaged, from byte {place} to byte {file.read_bytes().index(b'1.cls')}" in one.reason


def test_a_member_shorter_than_its_header_says_spoils_itself_alone(tmp_path: Path) -> None:
    file = shard(tmp_path / "x.tar", numbered(0, 1, 2))
    whole = file.read_bytes()
    start = whole.index(IMAGES[1])
    file.write_bytes(whole[: start + 200] + whole[start + len(IMAGES[1]) + -len(IMAGES[1]) % 512 :])
    index, report = build_index(tmp_path)
    assert names(index) == ["0.jpg", "2.jpg"]
    assert "1.jpg" in reasons(report)


def test_tar_files_behind_one_another_are_read_to_the_end(tmp_path: Path) -> None:
    one, two = (shard(tmp_path / f"{k}.tar", [(f"{k}.jpg", IMAGES[k]), (f"{k}.cls", b"0")]) for k in range(2))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    index, report = build_index(one)
    assert (names(index), report.refused) == (["0.jpg", "1.jpg"], [])
    assert read(index, 1) == IMAGES[1]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_compressed_shards_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / name, "w:gz") as tar:
        tar.addfile(header(tarfile.DIRTYPE))
    with pytest.raises(UserError, match="compressed, so that its images cannot be read in place; unpack it"):
        build_index(tmp_path)


def test_empty_and_foreign_files_do_not_keep_others_from_use(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    (tmp_path / "b.tar").write_bytes(b"not a tar file" * 1000)
    shard(tmp_path / "c.tar", numbered(0))
    index, report = build_index(tmp_path)
    assert paths(index) == ["c.tar#0.jpg"]
    assert [Path(one.path).name for one in report.refused] == ["a.tar", "b.tar"]
    assert "not a tar file, or damaged, from byte 0 to its end" in report.refused[1].reason


def test_json_labels_alone(tmp_path: Path) -> None:
    members: list[tuple[str, Content]] = []
    for k, name in enumerate(["dog", "ant"]):
        members += [(f"{k}.json", json.dumps({"class": name}).encode()), (f"{k}.webp", encode(picture(), "WEBP"))]
    index, _ = build_index(shard(tmp_path / "x.tar", members))
    assert [index.classes[k] for k in index.labels] == ["dog", "ant"]
