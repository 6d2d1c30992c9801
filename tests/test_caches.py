"""What is kept between runs is read back only from a place that is the user's alone; files are replaced whole."""

from __future__ import annotations

import ctypes
import logging
import os
import stat
import threading
from pathlib import Path

import pytest

from fluid_eval.running import forward_time_cache
from fluid_model.common import cache_folder, files
from fluid_model.common.errors import ConfigError
from fluid_model.forward.forward_time import ForwardTime

pytestmark = pytest.mark.skipif(os.name != "posix", reason="by users and modes of files")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_made_for_the_user_alone(home):
    assert cache_folder.folder() == home / "fluid-eval"
    assert stat.S_IMODE(cache_folder.folder().stat().st_mode) == 0o700
    cache_folder.folder().chmod(0o755)  # as earlier versions made it: others could read it, and no more
    assert stat.S_IMODE(cache_folder.folder().stat().st_mode) == 0o700
    assert cache_folder.cached_file("x") is None
    (cache_folder.folder() / "x").touch()
    assert cache_folder.cached_file("x") == home / "fluid-eval" / "x"


def open_to_a_group(home: Path) -> None:
    cache_folder.folder().chmod(0o770)


def open_to_all(home: Path) -> None:
    cache_folder.folder().chmod(0o707)


def below_what_all_may_write(home: Path) -> None:
    cache_folder.folder()
    home.chmod(0o777)


def a_link(home: Path) -> None:
    home.mkdir()
    (home / "other").mkdir()
    (home / "fluid-eval").symlink_to(home / "other")


def anothers(home: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(cache_folder.folder(), 54321, -1)


@pytest.mark.parametrize("spoil", [open_to_a_group, open_to_all, below_what_all_may_write, a_link, anothers])
def test_what_others_may_write_is_not_trusted(home, spoil, monkeypatch):
    spoil(home)
    (home / "fluid-eval" / "forward_times.json").write_text('{"m on d": {"points": [[1, 7.0]]}}')
    with pytest.raises(OSError, match=r"XDG_CACHE_HOME"):
        cache_folder.folder()
    assert forward_time_cache.known() == {}
    forward_time_cache._store({"m on d": ForwardTime([(1, 9.0)])})
    assert (home / "fluid-eval" / "forward_times.json").read_text() == '{"m on d": {"points": [[1, 7.0]]}}'


def test_a_file_that_others_may_write_is_not_trusted():
    (cache_folder.folder() / "forward_times.json").write_text('{"m on d": {"points": [[1, 7.0]]}}')
    assert forward_time_cache.known()["m on d"].points == [(1, 7.0)]
    (cache_folder.folder() / "forward_times.json").chmod(0o666)
    assert forward_time_cache.known() == {}


def test_a_folder_in_what_all_may_write_but_not_rename_is_trusted(home):
    home.mkdir()
    home.chmod(0o1777)
    assert cache_folder.folder().is_dir()


def test_without_a_home_nothing_is_kept(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(OSError, match="no home directory"):
        cache_folder.folder()
    assert forward_time_cache.known() == {}


def test_compiled_code_of_others_is_not_loaded(tmp_path, monkeypatch, caplog):
    from fluid_model.forward.compiled import build, structs

    sizes = {struct.__name__: ctypes.sizeof(struct) for struct in structs.STRUCTS}
    functions = [f"void {name}() {{}}\n" for name in structs.FUNCTIONS]
    constants = [f"const long sizeof_{name} = {size};\n" for name, size in sizes.items()]
    (tmp_path / "small.c").write_text("".join([*functions, *constants]))
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(build, "FLAGS", ("-fPIC", "-shared", "-std=gnu11"))
    if (made := build._attempt.__wrapped__(4)[0]) is None:
        pytest.skip("no compiler here")
    (file,) = cache_folder.folder().glob("compiled-*.so")
    os.truncate(file, 0)
    file.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        again = build._attempt.__wrapped__(4)[0]
    assert again is not None
    assert again._name != made._name
    assert "compiled for this process alone" in caplog.text
    assert not Path(again._name).exists()


def test_a_link_is_followed_and_stays(tmp_path):
    real, link, broken = tmp_path / "real", tmp_path / "link", tmp_path / "broken"
    real.write_text("before")
    link.symlink_to(real)
    broken.symlink_to(tmp_path / "new")
    files.write(link, "after\udc80", errors="xmlcharrefreplace")
    files.write(broken, "new")
    assert link.is_symlink()
    assert real.read_text() == "after&#56448;"
    assert (tmp_path / "new").read_text() == "new"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["broken", "link", "new", "real"]


def through_a_pipe(pipe, write):
    """What arrives at a pipe that `write` is given as its file; the pipe must still be one."""
    got = []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)  # it waits for ever if not met
    reader.start()
    write(pipe)
    reader.join(5)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    return got


def test_what_is_no_regular_file_is_written_into(tmp_path):
    assert through_a_pipe(tmp_path / "pipe", lambda pipe: files.write(pipe, "through")) == ["through"]
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    for null in (link, Path(os.devnull)):
        files.write(null, "away")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(IsADirectoryError):
        files.write(tmp_path, "x")


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        files.write(file, "\udc80")

    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        files.write(file, "after")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "before"


def test_a_page_is_written_into_what_is_no_file(tmp_path):
    """Such as /dev/null, which root could replace."""
    from fluid_eval.output.report import write

    got = through_a_pipe(tmp_path / "pipe", lambda pipe: write._write(pipe, "page \udc80"))
    assert got == ["page &#56448;"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "page")
    with pytest.raises(ConfigError, match="link: cannot be written"):
        write._write(tmp_path / "link", "page")
