import draftsmith.core.progress as progress


def lines(capsys, monkeypatch, total):
    monkeypatch.setattr(progress, "LOG_EVERY_S", -1.0)
    with progress.Meter("reading", total, "rows") as meter:
        meter.advance(10, tokens=50)
        meter.advance(10, tokens=50, note="loss 2.0")
    return capsys.readouterr().err.splitlines()


def test_lines_tell_rate_note_and_time_left(capsys, monkeypatch):
    first, second = lines(capsys, monkeypatch, 40)
    assert first.startswith("reading: 10/40 rows, ")
    assert " tokens/s, " in first
    assert first.endswith(" left")
    assert ", loss 2.0, " in second
    assert second.startswith("reading: 20/40 rows, ")


def test_an_unknown_total_promises_no_end(capsys, monkeypatch):
    _, second = lines(capsys, monkeypatch, None)
    assert second.startswith("reading: 20 rows, ")
    assert second.endswith(", loss 2.0")


def test_the_first_moments_and_the_end_promise_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY_S", -1.0)
    meter = progress.Meter("reading", 1000, "rows")
    for amount in (10, 990, 5):
        meter.advance(amount)
    assert not any("left" in line for line in capsys.readouterr().err.splitlines())


def test_resumed_units_do_not_count_towards_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY_S", -1.0)
    clock = iter([0.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    meter = progress.Meter("train", 100)
    meter.resume(80)
    meter.advance(10)  # ten units in ten seconds, ten more to go
    assert capsys.readouterr().err == "train: 90/100 steps, 10 s left\n"
