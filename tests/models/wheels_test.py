"""A wheel's files arrive whole and checked, or not at all. No test needs a network."""

import hashlib
import stat
import subprocess
import sys
import zipfile

import pytest

from jaxpeft.models import _wheels as wheels
from jaxpeft.models import fetch_wheel

NAME = "tinydata"
FILES = {"tinydata/data/a.txt": "alpha", "tinydata/data/sub/b.txt": "beta" * 1000}


def build(folder, extra=(), cut=None):
    """Writes a wheel pip accepts and returns its hash."""
    path = folder / f"{NAME}-1.0-py3-none-any.whl"
    info = f"{NAME}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
        for name, text in extra:
            archive.writestr(name, text)
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n"
            "Requires-Dist: a-package-that-does-not-exist\n",
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\nGenerator: t\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    if cut is not None:
        path.write_bytes(path.read_bytes()[:cut])
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that stands for the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("JAXPEFT_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the cache should have been enough")

    return lambda: monkeypatch.setattr(wheels, "_download", refuse)


def fetch(sha256, members=("tinydata/data/*",), **options):
    return fetch_wheel(f"{NAME}==1.0", sha256=sha256, members=list(members), **options)


def test_files_arrive_and_are_cached(index, offline, tmp_path):
    sha256 = build(index)
    folder = fetch(sha256)
    assert folder.is_relative_to(tmp_path / "cache")
    for name, text in FILES.items():
        assert (folder / name).read_text() == text
    assert not (folder / f"{NAME}-1.0.dist-info").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    offline()
    assert fetch(sha256) == folder


def test_members_select(index):
    sha256 = build(index)
    one = fetch(sha256, ["*/a.txt"])
    assert (one / "tinydata/data/a.txt").exists()
    assert not (one / "tinydata/data/sub/b.txt").exists()
    assert one != fetch(sha256)  # another selection does not meet this one


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "manifest"])
def test_damaged_cache_is_fetched_again(index, damage):
    sha256 = build(index)
    folder = fetch(sha256)
    path = folder / "tinydata/data/sub/b.txt"
    if damage == "cut":
        path.write_text("beta")
    elif damage == "changed":
        path.write_text("bete" * 1000)
    elif damage == "gone":
        path.unlink()
    else:
        (folder / ".jaxpeft-wheel.json").write_text('{"tinydata')
    assert (fetch(sha256) / "tinydata/data/sub/b.txt").read_text() == "beta" * 1000


def test_wrong_hash(index, tmp_path):
    sha256 = build(index)
    with pytest.raises(ValueError, match=f"expected {'0' * 64}, got {sha256}"):
        fetch("0" * 64)
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_truncated_wheel(index, tmp_path, monkeypatch):
    build(index)
    whole = (index / f"{NAME}-1.0-py3-none-any.whl").read_bytes()
    sha256 = hashlib.sha256(whole).hexdigest()

    def cut_short(requirement, folder, advance):
        folder.mkdir()
        (folder / "cut.whl").write_bytes(whole[:300])
        return folder / "cut.whl"

    monkeypatch.setattr(wheels, "_download", cut_short)
    with pytest.raises(ValueError, match=r"\(cut.whl, 300 bytes\).*cut short"):
        fetch(sha256)
    # and if the hash itself was taken from the broken file
    with pytest.raises(ValueError, match="no sound zip file"):
        fetch(hashlib.sha256(whole[:300]).hexdigest())
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_pattern_without_match_names_near_files(index):
    sha256 = build(index)
    with pytest.raises(ValueError, match=r"'tinydata/a.txt'.*nearest: \['tinydata/d"):
        fetch(sha256, ["tinydata/a.txt"])


def test_pip_failure_says_what_to_do(index):
    with pytest.raises(RuntimeError, match="(?s)No matching distribution.*FIND_LINKS="):
        fetch("0" * 64)


def test_without_pip(index, monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(RuntimeError, match="-m ensurepip"):
        fetch("0" * 64)


def link():
    info = zipfile.ZipInfo("tinydata/data/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "member", ["tinydata/data/../../../out", "/tinydata/data/out", link()], ids=str
)
def test_paths_that_leave_the_folder(index, member, tmp_path):
    sha256 = build(index, [(member, "bad")])
    with pytest.raises(ValueError, match="could leave its folder"):
        fetch(sha256, ["*"])
    assert not list(tmp_path.rglob("out"))


def test_killed_in_the_middle_leaves_nothing_complete(index, tmp_path, monkeypatch):
    sha256 = build(index)
    unpack = wheels._unpack

    def die(wheel, members, folder, advance):
        unpack(wheel, members, folder, advance)
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "_unpack", die)
    with pytest.raises(KeyboardInterrupt):
        fetch(sha256)
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    left = tmp_path / "cache" / "wheels" / ".partial-old"  # as kill -9 would leave it
    (left / "files").mkdir(parents=True)
    wheels.os.utime(left, (0, 0))
    folder = fetch(sha256, cache=tmp_path / "cache")
    assert (folder / "tinydata/data/a.txt").exists() and not left.exists()


def test_processes_at_once(index, tmp_path):
    sha256 = build(index)
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('w', {wheels.__file__!r})\n"
        "w = importlib.util.module_from_spec(spec); spec.loader.exec_module(w)\n"
        f"print(w.fetch_wheel('{NAME}==1.0', sha256='{sha256}', "
        "members=['tinydata/data/*'], progress=False))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    folders = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(folders) == 1
    assert len(list((tmp_path / "cache" / "wheels").iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requirement": "tinydata>=1"}, "names no single wheel"),
        ({"sha256": "abc"}, "64 lower-case hexadecimal"),
        ({"members": "tinydata/*"}, "list of path patterns"),
        ({"members": []}, "list of path patterns"),
    ],
)
def test_malformed_arguments(change, message):
    arguments = {"requirement": "a==1", "sha256": "0" * 64, "members": ["*"]} | change
    with pytest.raises(ValueError, match=message):
        fetch_wheel(arguments.pop("requirement"), **arguments)


def test_progress_without_rich(index, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    fetch(build(index))
    assert capsys.readouterr().err.splitlines() == [
        f"Fetching {NAME}==1.0 from the package index",
        f"Fetched {NAME}==1.0",
    ]


def test_quiet(index, capfd):
    fetch(build(index), progress=False)
    assert capfd.readouterr() == ("", "")
