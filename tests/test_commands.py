"""What every command of the package does around its work, in processes that import nothing heavy."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bioprop.commands import ctrl_c_withheld, unbreakable

SOURCE = Path(__file__).parents[1] / "src"
SAYS = "import sys; sys.stdout.write('caf\\u00e9 98 \\u00b1 1 \\u2022\\n'); sys.stdout.flush(); print('more')"


def conducted(command: str, redirected: str = "", **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """Conduct a command (the body of a function, in one line), as a shell starts it."""
    script = f"from bioprop.commands import conduct\ndef command():\n    {command}\nconduct(command)"
    words = ["sh", "-c", f'"$0" -c "$1" {redirected}', sys.executable, script]
    return subprocess.run(
        words, capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(SOURCE)} | environment
    )


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "ascii:strict", "cp1252"])
def test_output_that_is_not_in_utf_8_ends_no_command(encoding: str) -> None:
    done = conducted(SAYS, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    lossless = "caf\u00e9 98 \u00b1 1 \u2022\nmore\n".encode(encoding.partition(":")[0], errors="backslashreplace")
    assert done.stdout == lossless


def test_file_names_of_any_bytes_can_be_printed() -> None:
    assert conducted("print('\\udce4.png')", PYTHONIOENCODING="utf-8").stdout == b"\\udce4.png\n"


@pytest.mark.parametrize(
    ("redirected", "said"),
    [
        ("| head -c 0", b"bioprop: output is lost from here on: Broken pipe\n"),
        (">/dev/full", b"bioprop: output is lost from here on: No space left on device\n"),
        (">&-", b""),
        ("2>&-", b""),
        (">&- 2>&- <&-", b""),
    ],
)
def test_output_that_is_lost_ends_no_command(
    redirected: str, said: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    late = "import time; time.sleep(0.3); " if "head" in redirected else ""  # until nobody reads any more
    work = "open('whole', 'w').write('done'); print('end', file=sys.stderr); return 7"
    done = conducted(f"{late}{SAYS}; {work}", f"{redirected}; echo $? >status")
    assert Path("whole").read_text() == "done"  # no file took the place of the output
    assert Path("status").read_text() == ("0\n" if "head" in redirected else "7\n")  # head's own, or the command's
    assert done.stderr == (b"" if "2>&-" in redirected else said + b"end\n")


@pytest.mark.parametrize(("redirected", "status"), [(">/dev/full", 2), (">/dev/null", 0)])
def test_a_command_that_only_prints_has_failed_where_it_could_not(redirected: str, status: int) -> None:
    assert conducted("import sys; print('the whole configuration'); sys.exit(0)", redirected).returncode == status


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("from bioprop.errors import UserError; raise UserError('so it is')", 2, "bioprop: error: so it is\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("import sys; sys.exit(143)", 143, ""),
        ("return 1", 1, ""),
        ("return None", 0, ""),
    ],
)
def test_the_exit_status_says_how_it_ended(command: str, status: int, said: str) -> None:
    done = conducted(command)
    assert (done.returncode, done.stderr.decode()) == (status, said)


def test_a_bug_shows_its_traceback() -> None:
    done = conducted("raise ValueError('ours')")
    assert done.returncode == 1
    assert done.stderr.startswith(b"Traceback")


def test_a_terminal_that_is_closed_takes_no_run_with_it() -> None:
    terminal, side = os.openpty()
    stream = unbreakable(side)
    stream.write("seen\n")
    assert os.read(terminal, 99).startswith(b"seen")
    os.close(terminal)
    stream.write("lost\n")
    assert stream.buffer.raw.refusal.strerror == "Input/output error"  # type: ignore[attr-defined]
    stream.write("lost, too\n")
    os.close(side)


def test_ctrl_c_waits_until_a_process_can_answer_it() -> None:
    script = (
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\n"  # as if while the interpreter starts
        "from bioprop.commands import conduct\nconduct(lambda: time.sleep(9))"
    )
    words = [sys.executable, "-c", script]
    with ctrl_c_withheld():
        done = subprocess.run(words, capture_output=True, check=False, env=os.environ | {"PYTHONPATH": str(SOURCE)})
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_a_stream_that_was_unbuffered_stays_so(tmp_path: Path) -> None:
    """As under `python -u`: what a process says before it ends without cleaning up is there."""
    with (tmp_path / "output").open("wb", buffering=0) as file:
        like = io.TextIOWrapper(file, write_through=True)
        unbreakable(file.fileno(), like).write("no end of line")
        assert (tmp_path / "output").read_text() == "no end of line"
        like.detach()
