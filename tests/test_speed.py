"""benchmarks/speed.py: its ratios are those of the times, its words choose, its peaks are peaks."""

import json
import os
import time
from functools import partial

import pytest
import speed
import torch
from case import Case, load_average


def sleep(seconds):
    time.sleep(seconds)
    return 1


def equal(baseline, ours):
    assert baseline == ours


def timed_case(*sides):
    return Case("fake: sleep", 2.0, lambda: sides, equal)


def test_a_word_that_chooses_nothing_is_one_line_with_the_remedy(cli):
    ran = cli("speed", "nosuchword")
    assert ran.code == 2 and not ran.out
    assert len(ran.err.splitlines()) == 1
    assert "'nosuchword'" in ran.err and "pass a part of one of these: extract: S/16" in ran.err
    ran = cli("speed", "log-bin", "nosuchword")
    assert ran.code == 2 and "'nosuchword'" in ran.err


def test_words_choose_lines():
    chosen = speed.chosen_cases(["log-bin", "four times"])
    names = [case.name for case in chosen]
    assert len(names) == 3 and all("log-bin" in name or "four times" in name for name in names)
    assert speed.chosen_cases([]) == speed.all_cases()
    assert len({case.name for case in speed.all_cases()}) == len(speed.all_cases())


def test_ratios_are_those_of_the_times(monkeypatch):
    monkeypatch.setattr(speed, "matrix_rate", lambda precision: 1e9)
    case = timed_case(partial(sleep, 0.2), partial(sleep, 0.05), partial(sleep, 0.1))
    row = speed.measure(case, 3)
    assert row["reference/ours"] == pytest.approx(4, rel=0.25)
    assert row["today/ours"] == pytest.approx(2, rel=0.25)
    assert row["asked"] == 2.0
    assert row["floor s"] is None and row["ours/floor"] is None  # nothing is multiplied

    row = speed.measure(timed_case(partial(sleep, 0.02), partial(sleep, 0.01)), 1)
    assert row["today s"] is None and row["today/ours"] is None


@pytest.mark.parametrize("before, after", [(1e6, 5e5), (5e5, 1e6)])
def test_the_floor_is_counted_multiplications_at_the_rate(monkeypatch, before, after):
    """That is the higher one of those before and after the line is timed."""
    rates = {"float32": iter([before, after])}
    monkeypatch.setattr(speed, "matrix_rate", lambda precision: next(rates[precision]))
    x, weight = torch.ones(30, 50), torch.ones(50, 70)

    def product():
        return (x @ weight).sum().item()

    row = speed.measure(timed_case(product, product), 1)
    assert row["floor s"] == pytest.approx(30 * 50 * 70 / 1e6)
    assert row["ours/floor"] == pytest.approx(row["ours s"] / row["floor s"])


@pytest.mark.parametrize("number", [0, 2])
def test_baselines_of_another_result_are_told(number):
    """Before anything is timed."""
    sides = [partial(sleep, 0), partial(sleep, 0), partial(sleep, 0)]
    sides[number] = lambda: 2
    with pytest.raises(AssertionError):
        speed.measure(timed_case(*sides), 1)


def test_rates_are_bounded_in_time():
    assert speed.highest_rate(1000, partial(sleep, 0.01)) == pytest.approx(1e5, rel=0.3)
    assert speed.highest_rate(10**9, partial(sleep, 60), expected=1e6) == 0.0


def test_table_holds_every_line(cli, tmp_path, monkeypatch):
    case = timed_case(partial(sleep, 0.02), partial(sleep, 0.01))
    slow = case._replace(name="fake: emulated", dtype="bfloat16")

    def missing():
        raise FileNotFoundError("no sample here: set LIFT_SHARED")

    absent = case._replace(name="fake: absent", setup=missing)
    monkeypatch.setattr(speed, "all_cases", lambda: [case, slow, absent])
    rates = {"float32": 2e9, "bfloat16": 1e9}
    monkeypatch.setattr(speed, "matrix_rate", lambda precision: rates[precision])
    files = {"--json": tmp_path / "speed.json", "--markdown": tmp_path / "speed.md"}
    flags = [part for pair in files.items() for part in pair]
    ran = cli("speed", "--repeats", 2, *flags)
    assert ran.code == 0
    assert "skipped: fake: emulated: bfloat16 is slower than float32" in ran.err
    assert "skipped: fake: absent: no sample here" in ran.err

    written = json.loads((tmp_path / "speed.json").read_text())
    assert [row["case"] for row in written["rows"]] == ["fake: sleep"]
    assert written["machine"]["float32 GFLOP/s"] == 4
    table = (tmp_path / "speed.md").read_text()
    assert table.startswith("| case | reference s | today s |")
    assert "| fake: sleep | 0.0" in table and table in ran.out
    assert cli("speed", "--repeats", 0).code == 2

    # peak memory is known under Linux only; elsewhere the table stands without it
    monkeypatch.setattr(speed.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(speed, "all_cases", lambda: [case._replace(memory=1.0)])
    ran = cli("speed", "--repeats", 1)
    assert ran.code == 0 and "note: peak memory is read under Linux only" in ran.err


def test_a_line_that_fails_leaves_the_others(cli, tmp_path, monkeypatch):
    """It is told, and the exit status is 1; what is measured is written before the next line."""
    good = timed_case(partial(sleep, 0.02), partial(sleep, 0.01))
    wrong = timed_case(lambda: 2, partial(sleep, 0))._replace(name="fake: wrong")
    no_peak = good._replace(name="fake: no peak", memory=1.0)
    script = tmp_path / "child.py"  # instead of speed.py, whose imports take seconds
    script.write_text("raise SystemExit('no memory')")
    monkeypatch.setattr(speed, "__file__", str(script))
    file = tmp_path / "speed.json"

    def stop():
        raise KeyboardInterrupt

    last = good._replace(name="fake: last", setup=stop)
    monkeypatch.setattr(speed, "all_cases", lambda: [wrong, no_peak, good])
    monkeypatch.setattr(speed, "matrix_rate", lambda precision: 1e9)
    monkeypatch.setattr(speed.platform, "system", lambda: "Linux")
    ran = cli("speed", "--repeats", 1, "--json", file)
    assert ran.code == 1
    wrong_told, peak_told, *rows_told = ran.err.splitlines()
    assert wrong_told.startswith("skipped: fake: wrong: a baseline gives another result (")
    peak = "note: fake: no peak: no memory ratio, reference ended with status 1: no memory"
    assert peak_told == peak
    assert [line.split("  ")[0] for line in rows_told] == ["case fake: no peak", "case fake: sleep"]
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == ["fake: no peak", "fake: sleep"]
    assert rows[0]["memory ratio"] is None

    monkeypatch.setattr(speed, "all_cases", lambda: [good, last])
    assert cli("speed", "--repeats", 1, "--json", file).code == 130
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == ["fake: sleep"]


def test_machines_that_count_no_load(monkeypatch):
    """Such as Windows."""
    assert load_average() >= 0
    monkeypatch.delattr(os, "getloadavg")
    assert load_average() is None
    assert "load" not in speed.machine({"float32": 1e9})


def test_a_peak_is_of_a_whole_name(cli):
    """A part of it, which might be several lines, is refused."""
    ran = cli("speed", "--peak", "log-bin", "ours")
    assert ran.code == 2 and not ran.out
    assert ran.err.endswith("no line is named 'log-bin': pass a whole name of the table\n")
    (case,) = speed.chosen_cases(["log-bin"])
    assert speed.named_case(case.name) == case


def test_peak_is_the_memory_above_what_stands(capsys):
    def take():
        return torch.ones(2**24).sum().item() and 1  # 64 MiB

    case = timed_case(partial(sleep, 0), take)
    speed.print_peak(case, "ours")
    assert 60 < float(capsys.readouterr().out) < 90
    speed.print_peak(case, "reference")
    assert float(capsys.readouterr().out) < 10
    speed.print_peak(case, "today")
    assert capsys.readouterr().out == "none\n"


def test_memory_ratio_is_the_smaller_baselines():
    """Peaks of a real line, in processes of their own."""
    (case,) = speed.chosen_cases(["log-bin"])
    assert 0.2 < speed.memory_ratio(case) < 5
