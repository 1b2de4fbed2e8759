import pytest

from sdxl_ray.config.units import Duration, Warmup, parse_duration, parse_warmup


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2000 steps", Duration(2000, "steps")),
        ("1 step", Duration(1, "steps")),
        ("10 epochs", Duration(10, "epochs")),
        ("1 epoch", Duration(1, "epochs")),
        ("  5steps ", Duration(5, "steps")),
        (Duration(3, "epochs"), Duration(3, "epochs")),
    ],
)
def test_durations_carry_their_unit(given, expected):
    assert parse_duration(given) == expected


@pytest.mark.parametrize(
    "given", ["2000", 2000, "-1 steps", "1.5 epochs", "2000 step s", "ten epochs", "", "5 %", None]
)
def test_a_duration_without_a_number_or_unit_is_refused(given):
    with pytest.raises(ValueError, match='needs a whole number and its unit, such as "2000 steps" or "10 epochs"'):
        parse_duration(given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("100 steps", Warmup(duration=Duration(100, "steps"))),
        ("1 epoch", Warmup(duration=Duration(1, "epochs"))),
        ("5 %", Warmup(percent=5.0)),
        ("2.5%", Warmup(percent=2.5)),
        ("100 %", Warmup(percent=100.0)),
    ],
)
def test_a_warmup_is_a_duration_or_a_share(given, expected):
    assert parse_warmup(given) == expected


@pytest.mark.parametrize("given", ["101 %", "-1 %", "0.05", 0.05, "5 percent", "steps"])
def test_a_wrong_warmup_is_refused(given):
    with pytest.raises(ValueError, match='such as "100 steps", "1 epoch" or "5 %"'):
        parse_warmup(given)


@pytest.mark.parametrize("text", ["7 steps", "1 epochs"])
def test_a_duration_reads_what_it_writes(text):
    assert str(parse_duration(text)) == text


@pytest.mark.parametrize("given", ["7 steps", "5 %", "33.333333333 %", "0.00001 %"])
def test_a_warmup_reads_what_it_writes(given):
    warmup = parse_warmup(given)
    assert parse_warmup(str(warmup)) == warmup


@pytest.mark.parametrize(
    ("duration", "steps_per_epoch", "expected"),
    [
        (Duration(7, "steps"), 2.5, 7),
        (Duration(2, "epochs"), 10, 20),
        (Duration(3, "epochs"), 2.5, 8),  # a part of a step is a step
        (Duration(100, "epochs"), 1.1, 110),  # not 111: 100 * 1.1 is 110.00000000000001
    ],
)
def test_a_duration_in_steps(duration, steps_per_epoch, expected):
    assert duration.in_steps(steps_per_epoch) == expected


@pytest.mark.parametrize(("given", "expected"), [("5 %", 50), ("30 steps", 30), ("2 epochs", 5), ("0 %", 0)])
def test_a_warmup_in_steps(given, expected):
    assert parse_warmup(given).in_steps(max_steps=1000, steps_per_epoch=2.5) == expected
