import pytest

from sdxl_ray.tracking import console as module
from sdxl_ray.tracking.console import Console

PLAIN = "[bold]not markup[/] :cat: https://example.org/a_b 1234 'text' " + "long " * 60 + "end"


def test_lines_are_printed_and_logged_as_they_are(tmp_path, capsys):
    console = Console(live=False, log_file=tmp_path / "log.txt")
    console.line(PLAIN)
    console.line("猫", style="yellow")
    console.line()
    assert capsys.readouterr().out == f"{PLAIN}\n猫\n\n"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == f"{PLAIN}\n猫\n\n"


def test_what_a_terminal_would_obey_is_written_out(tmp_path, capsys):
    console = Console(live=False, log_file=tmp_path / "log.txt")
    console.line("skipped \x1b]0;title\x07\x1b[2Jcat\r.png, \x9b31m, caf\udce9.png:\n\t\u732b e\u0301")
    shown = "skipped \\x1b]0;title\\x07\\x1b[2Jcat\\r.png, \\x9b31m, caf\\udce9.png:\n\t\u732b e\u0301\n"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == shown
    assert capsys.readouterr().out.expandtabs(8) == shown.expandtabs(8)


def test_log_to_adds_a_log_once_and_keeps_what_is_there_and_what_was_said(tmp_path, capsys):
    log = tmp_path / "runs" / "cat" / "log.txt"
    for text in ("first run", "second run"):
        console = Console(live=False)
        console.line("before the folder is known")
        console.log_to(log)
        console.log_to(log)
        console.line(text)
    early = "before the folder is known\n"
    assert log.read_text() == f"{early}first run\n{early}second run\n"


def test_a_log_that_cannot_be_written_is_given_up_and_the_others_go_on(tmp_path, capsys):
    broken, good = tmp_path / "broken.txt", tmp_path / "good.txt"
    broken.mkdir()
    console = Console(live=False, log_file=broken)
    console.log_to(good)
    console.line("one")
    console.line("two")
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\n"
    assert captured.err == f"{broken}: Is a directory; this log ends here\n"
    assert good.read_text() == "one\ntwo\n"


@pytest.fixture
def clock(monkeypatch):
    """Seconds since the machine started, set by the test."""
    now = {"s": 0.0}
    monkeypatch.setattr(module.time, "monotonic", lambda: now["s"])
    return now


@pytest.mark.parametrize("uptime", [0.0, 1e6])
def test_without_a_terminal_progress_is_a_line_every_ten_seconds_and_at_the_end(clock, capsys, uptime):
    console = Console(live=False)
    for done in range(1, 41):
        clock["s"] = uptime + done
        console.progress("images", done, 40)
    assert capsys.readouterr().out == (
        "images: 12/40  (1.0/s, 28s left)\nimages: 23/40  (1.0/s, 17s left)\n"
        "images: 34/40  (1.0/s, 6s left)\nimages: 40/40  (1.0/s)\n"
    )


def test_stages_have_their_own_clock(clock, capsys):
    console = Console(live=False)
    console.progress("text", 1, 9)
    clock["s"] = 8
    console.progress("images", 1, 9)
    clock["s"] = 11
    console.progress("text", 2, 9)
    console.progress("images", 2, 9)
    assert capsys.readouterr().out == "text: 2/9  (0.1/s, 1m17s left)\n"


def test_what_is_left_is_told_from_the_first_that_was_done_on(clock, capsys):
    """The encoders take half a minute to start, which says nothing about how fast they are."""
    console = Console(live=False)
    console.progress("images", 0, 400)
    clock["s"] = 15
    console.progress("images", 0, 400)
    clock["s"] = 30
    console.progress("images", 64, 400)
    assert console.per_second("images") is None
    clock["s"] = 34
    console.progress("images", 256, 400)
    assert console.per_second("images") is None  # shards come in bursts
    clock["s"] = 41
    console.progress("images", 284, 400)
    assert console.per_second("images") == 20
    clock["s"] = 47
    console.progress("images", 404, 404)
    assert capsys.readouterr().out == (
        "images: 0/400\nimages: 64/400\nimages: 284/400  (20.0/s, 6s left)\nimages: 404/404  (20.0/s)\n"
    )
    assert console.per_second("text") is None


def test_a_stage_of_the_next_dataset_has_its_own_speed(clock, capsys):
    """The scan of each dataset, of each 100,000 of its images and of their masks is the stage "scan"."""
    console = Console(live=False)
    for seconds, done, total in (
        *((0, 4096, 100_000), (20, 84_096, 100_000), (25, 100_000, 100_000)),
        *((40, 128, 100_000), (60, 2128, 100_000), (80, 100_000, 100_000)),
        *((120, 200_000, 300_000), (140, 240_000, 300_000)),  # more than the last had
        *((160, 0, 400), (180, 0, 400)),
    ):
        clock["s"] = seconds
        console.progress("scan", done, total)
    assert capsys.readouterr().out.splitlines() == [
        "scan: 84096/100000  (4000.0/s, 4s left)",
        "scan: 100000/100000  (3836.2/s)",
        "scan: 128/100000",
        "scan: 2128/100000  (100.0/s, 16m19s left)",
        "scan: 100000/100000  (2496.8/s)",
        "scan: 200000/300000",
        "scan: 240000/300000  (2000.0/s, 30s left)",
        "scan: 0/400",
        "scan: 0/400",
    ]


def test_a_bar_measures_speed_too(clock):
    with Console(live=True) as console:
        for done in (0, 64, 164):
            clock["s"] += 10
            console.progress("images", done, 400)
        assert console.per_second("images") == 10


def test_on_a_terminal_progress_is_a_bar_that_goes_away(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Console(live=True, log_file=tmp_path / "log.txt") as console:
        console.progress("images", 1, 4)
        assert [task.completed for task in console._progress.tasks] == [1]
        console.progress("images", 2, 4)
        console.progress("text", 1, 2)
        assert [(task.description, task.completed, task.total) for task in console._progress.tasks] == [
            ("images", 2, 4),
            ("text", 1, 2),
        ]
        console.progress("images", 4, 4)
        assert [task.description for task in console._progress.tasks] == ["text"]
        console.line("a line that stays")
    assert console._progress is None
    assert "a line that stays\n" in capsys.readouterr().out
    assert (tmp_path / "log.txt").read_text() == "a line that stays\n"  # no bars


def test_what_is_no_terminal_gets_no_bars(capsys):
    assert Console().live is False


def test_a_stage_with_nothing_to_do_is_not_told(capsys):
    console = Console(live=False)
    console.progress("images", 0, 0)
    assert capsys.readouterr().out == ""
