"""Files that cannot be written or read: what is said, what is kept, and that no work is thrown away for it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import os
import random
import re
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import killing
import pytest
import torch
from safetensors.torch import load_file
from test_cli import refused, work  # noqa: F401 - a fixture
from test_cli import unlearn as command

from nabla_tau import NonFiniteLossError, unlearn
from nabla_tau.checkpoint import load_checkpoint, save_checkpoint
from nabla_tau.recipes import ASCENT

CPU = torch.device("cpu")
SHORT = dataclasses.replace(ASCENT, name="short", batch_size=32, retain_passes=1.0, min_steps=1)


def run(memorised, checkpoint: Path | None, **settings):
    model, parts = memorised
    data = {name: parts[name] for name in ("forget", "retain", "held_out")}
    return unlearn(model, **data, **({"recipe": SHORT, "checkpoint": checkpoint, "checkpoint_every": 2} | settings))


def same_weights(a, b) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@contextlib.contextmanager
def files_of_at_most(size: int):
    """A real short write: the kernel takes `size` bytes of a file and refuses the rest (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(monkeypatch, name: str) -> None:
    """A disk that has no room left for files with `name` in their path."""
    fsync = os.fsync

    def refusing(descriptor: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)


class Trouble:
    """`log` function that makes trouble after some step, and ends it after another."""

    def __init__(self, context, first: int, last: int) -> None:
        self.context, self.first, self.last = context, first, last
        self.stack = contextlib.ExitStack()

    def __call__(self, values, step: int) -> None:
        if step == self.first:
            self.stack.enter_context(self.context)
        if step == self.last:
            self.stack.close()


@contextlib.contextmanager
def folder_replaced_by_a_file(folder: Path):
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.write_text("")
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


@pytest.mark.parametrize("trouble", ["short write", "folder gone"])
@pytest.mark.parametrize("until", ["end", "step 7"])
def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(tmp_path, memorised, caplog, trouble, until):
    path = tmp_path / "out" / "a.ckpt"
    context = files_of_at_most(4096) if trouble == "short write" else folder_replaced_by_a_file(path.parent)
    log = Trouble(context, first=4, last=7 if until == "step 7" else 99)
    with log.stack, pytest.warns(UserWarning, match="checkpoints could not be written") as caught:
        result = run(memorised, path, log=log)
    assert same_weights(result.model, run(memorised, None).model)
    cause = "File too large" if trouble == "short write" else "Not a directory"
    # 11 steps: checkpoints at 2, 4, 6, 8, 10 and 11, of which those from 6 on fail, or that of 6 alone.
    lost, last, kept = ("4 of 6", 11, 4) if until == "end" else ("1 of 6", 6, 11)
    (message,) = result.warnings
    assert message.startswith(f"{lost} checkpoints could not be written (the last one at step {last}: ")
    assert f"cannot write {path}: {cause}" in message
    assert message.endswith(f"that of step {kept} is kept")
    assert [str(warning.message) for warning in caught] == [message]
    assert len(caplog.records) == int(lost[0]), "said when it happens, not only hours later"
    assert load_checkpoint(path, CPU)["step"] == kept
    assert [file.name for file in path.parent.iterdir()] == ["a.ckpt"]
    assert same_weights(run(memorised, path, resume=True).model, result.model)


def test_a_run_that_fails_says_what_became_of_its_checkpoints(tmp_path, memorised):
    path, calls = tmp_path / "a.ckpt", []

    def forward(model, batch):
        calls.append(torch.is_grad_enabled())
        return model(batch[0]) * (float("nan") if sum(calls) > 12 else 1.0), batch[1]

    log = Trouble(files_of_at_most(4096), first=3, last=99)
    with log.stack, pytest.raises(NonFiniteLossError) as caught:
        run(memorised, path, forward=forward, log=log, performance="off")
    (message,) = caught.value.result.warnings
    assert message.startswith("2 of 3 checkpoints could not be written (the last one at step 6")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, {"step": 1})
    full_disk(monkeypatch, "a.ckpt")
    with pytest.raises(OSError, match=rf"cannot write {path}: No space left on device"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path, CPU) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def die_in_the_middle_of_a_write(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and then writing fails instead
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with files_of_at_most(4096):
        save_checkpoint(path, {"step": 2, "x": torch.zeros(100_000)})


def test_a_process_that_dies_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, {"step": 1})
    process = killing.start(die_in_the_middle_of_a_write, path)
    process.join(60)
    assert process.exitcode == -signal.SIGXFSZ
    assert load_checkpoint(path, CPU) == {"step": 1}
    # What the dead left beside it is in nobody's way.
    assert (tmp_path / "a.ckpt.tmp").stat().st_size == 4096
    save_checkpoint(path, {"step": 3})
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def read_only_folder(stack: contextlib.ExitStack) -> Path:
    """A folder that this process may not write to; root, whom permissions do not bind, becomes nobody meanwhile."""
    folder = Path(tempfile.mkdtemp())  # not tmp_path, which nobody but its owner may enter
    stack.callback(shutil.rmtree, folder)
    stack.callback(folder.chmod, 0o755)
    folder.chmod(0o555)
    if os.geteuid() == 0:
        try:
            os.seteuid(65534)
        except OSError as error:
            pytest.skip(f"root here, and cannot become nobody: {error}")
        stack.callback(os.seteuid, 0)
    return folder


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("place", "cause"),
    [("read-only", "Permission denied"), ("a file", "Not a directory"), ("a folder", "Is a directory")],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_anything_changes(
    tmp_path, memorised, place, cause, inplace
):
    model, parts = memorised
    mine, calls = copy.deepcopy(model), []

    def forward(model, batch):
        calls.append(1)
        return model(batch[0]), batch[1]

    with contextlib.ExitStack() as stack:
        if place == "read-only":
            path = read_only_folder(stack) / "new" / "a.ckpt"
        elif place == "a file":
            (tmp_path / "file").write_text("")
            path = tmp_path / "file" / "a.ckpt"
        else:
            path = tmp_path / "file"
            path.mkdir()
        with pytest.raises(OSError, match=rf"cannot write {path}: {cause}"):
            run((mine, parts), path, forward=forward, inplace=inplace, resume=True)
    assert same_weights(mine, model)
    assert not calls


def test_nothing_is_left_of_looking_whether_a_checkpoint_can_be_written(tmp_path, memorised):
    model, parts = memorised
    with pytest.raises(ValueError, match="forget set is empty"):
        run((model, parts | {"forget": []}), tmp_path / "new" / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_any_damage_to_a_checkpoint_is_found(tmp_path):
    path, draw = tmp_path / "a.ckpt", random.Random(0)
    save_checkpoint(path, {"x": torch.arange(100.0), "step": 3})
    whole = path.read_bytes()
    places = [*range(80), *(draw.randrange(len(whole)) for _ in range(200)), len(whole) - 1]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        for content in (flipped, whole[:place], whole + whole[:place] if place else b""):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"{path}.*(is damaged|is not a nabla_tau checkpoint)"):
                load_checkpoint(path, CPU)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_leaves_the_model_as_it_was(tmp_path, memorised, damage):
    model, parts = memorised
    path, mine = tmp_path / "a.ckpt", copy.deepcopy(model)
    run(memorised, path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    content = content[:-1] if damage == "truncated" else content
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"checkpoint {path} is damaged"):
        run((mine, parts), path, inplace=True, resume=True)
    assert same_weights(mine, model)
    assert path.read_bytes() == content


# The same through the command line.


@pytest.mark.usefixtures("work")
def test_command_goes_on_without_its_checkpoint_and_says_so(monkeypatch, capsys, caplog):
    full_disk(monkeypatch, "a.ckpt")
    assert command("--checkpoint", "a.ckpt") == 0
    said = capsys.readouterr().out
    assert re.search(r"warning: (\d+) of \1 checkpoints could not be written \(the last one at step 150: ", said)
    assert "cannot write a.ckpt: No space left on device; the run goes on" in caplog.text
    assert sorted(path.name for path in Path().glob("[an]*")) == ["new.json", "new.safetensors"]


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_command_refuses_a_damaged_checkpoint(capsys, damage):
    assert command("--checkpoint", "a.ckpt") == 0
    for name in ("new.safetensors", "new.json"):
        Path(name).unlink()
    content = bytearray(Path("a.ckpt").read_bytes())
    content[999] ^= 1
    content = content[:1000] if damage == "truncated" else content
    Path("a.ckpt").write_bytes(content)
    capsys.readouterr()
    assert "checkpoint a.ckpt is damaged" in refused(capsys, command("--checkpoint", "a.ckpt", "--resume"))
    assert Path("a.ckpt").read_bytes() == content
    assert not list(Path().glob("new.*"))


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("option", ["--out", "--checkpoint", "--json"])
def test_command_refuses_a_place_that_cannot_be_written_to(capsys, option):
    Path("file").write_text("")
    path = {"--out": "file/new.safetensors", "--checkpoint": "file/a.ckpt", "--json": "file/new.json"}[option]
    Path("task.py").write_text(Path("task.py").read_text() + "\ndef forward(model, batch):\n    raise SystemExit(9)\n")
    assert f"cannot write {path}: Not a directory" in refused(capsys, command(option, path))
    assert not list(Path().glob("new.*"))


@pytest.mark.usefixtures("work")
def test_command_that_cannot_write_its_weights_writes_them_elsewhere(monkeypatch, capsys, tmp_path):
    assert command() == 0
    wanted = load_file("new.safetensors")
    for name in ("new.safetensors", "new.json"):
        Path(name).unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    full_disk(monkeypatch, f"{tmp_path}/new.safetensors")
    capsys.readouterr()
    assert command() == 2
    rescued, error = capsys.readouterr().err.splitlines()
    assert rescued == f"unlearned weights: {elsewhere}/new.safetensors"
    assert error == "nabla-tau: [Errno 28] cannot write new.safetensors: No space left on device"
    assert all(torch.equal(value, wanted[name]) for name, value in load_file(elsewhere / "new.safetensors").items())
