import time
from collections import Counter

import numpy as np
import pytest

from sdxl_ray.config.units import parse_duration
from sdxl_ray.diffusion.randomness import keyed_generator
from sdxl_ray.errors import ConfigError
from sdxl_ray.train.order import DataOrder, Span
from sdxl_ray.train.plan import Every, Plan, run_length

AWKWARD = {
    "7, 1 and 13 images": {"a": 7, "b": 1, "c": 13},
    "one image": {"a": 1},
    "full micro-batches only": {"a": 8, "b": 4},
    "one large, many single": {"big": 30, **{f"single{number}": 1 for number in range(5)}},
    "smaller than a micro-batch": {"a": 3, "b": 2},
}


def make_order(counts, *, repeats=1, micro_batch_size=4, seed=0):
    buckets = [bucket for bucket, count in counts.items() for _ in range(count)]
    return DataOrder(buckets, [repeats] * len(buckets), micro_batch_size=micro_batch_size, seed=seed)


def make_plan(order, *, num_workers=1, accumulation=1, steps=None, epochs=None, step=0, position=0):
    max_steps, num_micro_batches = run_length(
        steps=steps,
        epochs=epochs,
        order=order,
        micro_batches_per_step=num_workers * accumulation,
        step=step,
        position=position,
    )
    never = Every(0)
    return Plan(
        order=order,
        num_workers=num_workers,
        accumulation=accumulation,
        max_steps=max_steps,
        num_micro_batches=num_micro_batches,
        log=never,
        evaluate=never,
        validate=never,
        save=never,
        max_grad_norm=1.0,
        seed=0,
    )


def steps_of(plan, step=0, position=0):
    """What the loop does: the micro-batches of each step, by rank."""
    steps = []
    while step < plan.max_steps:
        steps.append([plan.of_step(position, rank) for rank in range(plan.num_workers)])
        position = plan.next_position(position)
        step += 1
    return steps, position


def numbers(steps):
    return [number for ranks in steps for taken in ranks for number in taken]


# ---- the order of the data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_an_epoch_has_every_sample_exactly_repeats_times(counts, micro_batch_size, repeats):
    order = make_order(counts, repeats=repeats, micro_batch_size=micro_batch_size)
    epoch = order.epoch(2)
    seen = Counter(
        (row, repeat)
        for micro_batch in epoch
        for row, repeat in zip(micro_batch.rows, micro_batch.repeats, strict=True)
    )
    assert seen == {(row, repeat): 1 for row in range(sum(counts.values())) for repeat in range(repeats)}
    assert order.samples_per_epoch == repeats * sum(counts.values())
    assert len(epoch) == order.micro_batches_per_epoch


@pytest.mark.parametrize("counts", AWKWARD.values(), ids=AWKWARD)
def test_a_micro_batch_is_of_one_bucket_and_only_the_last_of_a_bucket_is_smaller(counts):
    buckets = [bucket for bucket, count in counts.items() for _ in range(count)]
    sizes = {bucket: [] for bucket in counts}
    for micro_batch in make_order(counts).epoch(0):
        (bucket,) = {buckets[row] for row in micro_batch.rows}
        sizes[bucket].append(len(micro_batch.rows))
    for bucket, count in counts.items():
        assert sorted(sizes[bucket], reverse=True) == [4] * (count // 4) + [count % 4] * (count % 4 > 0)


def test_samples_may_have_different_repeats():
    order = DataOrder(["a", "a", "b"], [1, 3, 2], micro_batch_size=2, seed=0)
    seen = Counter(row for micro_batch in order.epoch(0) for row in micro_batch.rows)
    assert seen == {0: 1, 1: 3, 2: 2}


def test_an_epoch_is_a_sequence_from_both_ends():
    epoch = make_order({"a": 8, "b": 5}).epoch(1)
    whole = list(epoch)
    assert len(whole) == 4
    assert [epoch[place] for place in range(-4, 0)] == whole
    assert list(reversed(epoch)) == whole[::-1]
    for place in (4, -5):
        with pytest.raises(IndexError, match=rf"^epoch 1 has 4 micro-batches, asked for number {place}$"):
            epoch[place]


def test_the_order_follows_from_seed_and_epoch():
    counts = AWKWARD["7, 1 and 13 images"]
    order = make_order(counts)
    assert list(order.epoch(3)) == list(make_order(counts).epoch(3))
    rows = [micro_batch.rows for micro_batch in order.epoch(0)]
    assert rows != [micro_batch.rows for micro_batch in order.epoch(1)]
    assert rows != [micro_batch.rows for micro_batch in make_order(counts, seed=1).epoch(0)]


def test_items_are_the_epochs_one_after_the_other_in_whatever_order_they_are_asked_for():
    order = make_order(AWKWARD["7, 1 and 13 images"])
    expected = [micro_batch for epoch in range(3) for micro_batch in order.epoch(epoch)]
    assert [micro_batch.number for micro_batch in expected] == list(range(3 * order.micro_batches_per_epoch))
    assert [order[number] for number in range(len(expected))] == expected
    assert [order[number] for number in (20, 0, 13, 7)] == [expected[number] for number in (20, 0, 13, 7)]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_buckets_are_mixed_in_proportion_to_their_sizes(epoch):
    """Half of an epoch has about half of each large bucket: never all wide images first."""
    counts = {"large": 800, "middle": 400, "small": 200}
    buckets = [bucket for bucket, count in counts.items() for _ in range(count)]
    first_half = make_order(counts).epoch(epoch)[: sum(counts.values()) // 4 // 2]
    seen = Counter(buckets[row] for micro_batch in first_half for row in micro_batch.rows)
    for bucket, count in counts.items():
        # hypergeometric: half of the bucket's micro-batches, give or take four standard deviations
        assert abs(seen[bucket] - count / 2) < 4 * 4 * (count / 4 / 4) ** 0.5, bucket


def order_of_the_first_version(buckets, repeats, micro_batch_size, seed, epoch):
    """Lists and objects, a sample at a time: what the columns have to give."""
    entries = {}
    for row, (bucket, count) in enumerate(zip(buckets, repeats, strict=True)):
        entries.setdefault(bucket, []).extend((row, repeat) for repeat in range(count))
    draw = keyed_generator(seed, epoch, "order")
    pieces = []
    for bucket in sorted(entries):
        items = entries[bucket]
        shuffled = [items[place] for place in draw.permutation(len(items))]
        pieces += [shuffled[start : start + micro_batch_size] for start in range(0, len(items), micro_batch_size)]
    return [tuple(pieces[piece]) for piece in draw.permutation(len(pieces))]


@pytest.mark.parametrize("trial", range(20))
def test_the_columns_give_the_order_that_lists_gave(trial):
    draw = np.random.default_rng(trial)
    num_samples = int(draw.integers(1, 80))
    buckets = draw.choice(["640x640", "1024x512", "96x3200"], num_samples).tolist()
    repeats = draw.integers(1, 4, num_samples).tolist()
    order = DataOrder(buckets, repeats, micro_batch_size=trial % 5 + 1, seed=trial)
    for epoch in range(3):
        expected = order_of_the_first_version(buckets, repeats, trial % 5 + 1, trial, epoch)
        assert [tuple(zip(each.rows, each.repeats, strict=True)) for each in order.epoch(epoch)] == expected
        in_order = [row for micro_batch in expected for row, _ in micro_batch]
        assert order.epoch(epoch).rows.tolist() == in_order


def test_names_and_numbers_of_buckets_give_the_same_order():
    names = ["1024x512", "640x640", "96x3200"]
    codes = np.random.default_rng(0).integers(0, 3, 50).astype(np.int32)
    by_number = DataOrder(codes, np.ones(50, int), micro_batch_size=4, seed=0)
    by_name = DataOrder([names[code] for code in codes], [1] * 50, micro_batch_size=4, seed=0)
    assert list(by_number.epoch(1)) == list(by_name.epoch(1))


def test_many_samples_are_ordered_quickly():
    """200,000 in 64 buckets; scripts/bench_plan.py measures a million. Lists took a second."""
    buckets = np.random.default_rng(0).integers(0, 64, 200_000).astype(np.int32)
    begun = time.process_time()
    order = DataOrder(buckets, np.ones(200_000, int), micro_batch_size=4, seed=0)
    for epoch in range(3):
        assert len(order.epoch(epoch)) == order.micro_batches_per_epoch
    assert time.process_time() - begun < 2


# ---- dealt out to ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize(("num_workers", "accumulation"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (5, 3)])
def test_two_epochs_end_exactly_and_all_ranks_do_the_same_number_of_steps(counts, num_workers, accumulation):
    order = make_order(counts)
    plan = make_plan(order, num_workers=num_workers, accumulation=accumulation, epochs=2)
    steps, position = steps_of(plan)
    assert position == plan.num_micro_batches == 2 * order.micro_batches_per_epoch
    assert sorted(numbers(steps)) == list(range(position))
    assert len(steps) == plan.max_steps == -(-position // (num_workers * accumulation))
    for ranks in steps[:-1]:
        assert [len(taken) for taken in ranks] == [accumulation] * num_workers
    # what a rank reads ahead is what its steps ask for
    for rank in range(num_workers):
        read = [share.micro_batch.number for share in plan.remaining(0, 0, rank)]
        assert read == [number for ranks in steps for number in ranks[rank]]


def test_the_last_step_may_leave_a_rank_without_a_micro_batch():
    plan = make_plan(make_order({"a": 20}), num_workers=2, accumulation=1, epochs=1)  # 5 micro-batches
    steps, _ = steps_of(plan)
    assert steps == [[[0], [1]], [[2], [3]], [[4], []]]


def test_the_samples_of_a_step_do_not_depend_on_how_they_are_dealt_out():
    order = make_order(AWKWARD["7, 1 and 13 images"])

    def samples(**dealt):
        steps, _ = steps_of(make_plan(order, steps=6, **dealt))
        return [sorted(row for taken in ranks for number in taken for row in order[number].rows) for ranks in steps]

    assert (
        samples(num_workers=4, accumulation=1)
        == samples(num_workers=2, accumulation=2)
        == samples(num_workers=1, accumulation=4)
    )


@pytest.mark.parametrize("position", [0, 1, 4, 9, 12])
def test_what_remains_from_a_position_is_the_tail_of_the_whole(position):
    order = make_order(AWKWARD["7, 1 and 13 images"])
    plan = make_plan(order, epochs=2)
    whole = [share.micro_batch.number for share in plan.remaining(0, 0, 0)]
    assert [share.micro_batch.number for share in plan.remaining(0, position, 0)] == whole[position:]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 3), (3, 4), (2, 2)])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_resume_with_other_workers_sees_each_sample_exactly_once(before, after, stop_after):
    order = make_order({"a": 30, "b": 13, "c": 1})
    first = make_plan(order, num_workers=before, epochs=1)
    begun, _ = steps_of(first)
    done = begun[:stop_after]
    position = len(numbers(done))
    resumed = make_plan(order, num_workers=after, epochs=1, step=stop_after, position=position)
    rest, end = steps_of(resumed, step=stop_after, position=position)
    assert sorted(numbers(done) + numbers(rest)) == list(range(order.micro_batches_per_epoch))
    assert end == order.micro_batches_per_epoch
    assert resumed.max_steps == stop_after + len(rest)


def test_in_steps_a_resume_with_other_workers_keeps_the_steps():
    order = make_order({"a": 30})
    resumed = make_plan(order, num_workers=3, steps=10, step=4, position=8)  # 4 steps of 2 workers
    assert (resumed.max_steps, resumed.num_micro_batches) == (10, 8 + 6 * 3)


@pytest.mark.parametrize("length", [{"steps": 3}, {"epochs": 1}])
def test_a_resume_behind_the_end_has_nothing_to_do(length):
    plan = make_plan(make_order({"a": 8}), step=5, position=5, **length)
    assert steps_of(plan, step=5, position=5) == ([], 5)
    assert list(plan.remaining(0, 5, 0)) == []


@pytest.mark.parametrize(
    ("every", "due"),
    [
        (Every(3), [3, 6, 9]),
        (Every(3, last=10), [3, 6, 9, 10]),
        (Every(5, last=10), [5, 10]),
        (Every(0), []),
        (Every(0, last=10), [10]),
        (Every(20), []),
    ],
)
def test_what_is_due(every, due):
    assert [step for step in range(1, 11) if every.due(step)] == due


# ---- phases: datasets that begin and end -----------------------------------------------------------------------------


def span(name, start="0 steps", end="0 steps"):
    return Span(name, parse_duration(start), parse_duration(end))


def make_phases(sizes, spans, *, micro_batches_per_step=1, micro_batch_size=4, repeats=1):
    """Datasets of `sizes` images, each half in bucket "a" and half in "b"; rows are dataset after dataset."""
    datasets = np.repeat(np.arange(len(sizes)), sizes)
    return DataOrder(
        ["ab"[row % 2] for row in range(len(datasets))],
        [repeats] * len(datasets),
        micro_batch_size=micro_batch_size,
        seed=0,
        datasets=datasets,
        spans=spans,
        micro_batches_per_step=micro_batches_per_step,
    )


def rows_in(epoch):
    return Counter(row for micro_batch in epoch for row in micro_batch.rows)


@pytest.mark.parametrize(
    "spans",
    [
        [span("cats"), span("dogs")],
        [span("cats", "0 epochs", "0 epochs"), span("dogs")],
        [Span("cats"), Span("dogs")],
        [],
    ],
)
def test_datasets_that_take_part_always_change_nothing(spans):
    sizes = (10, 7)
    plain = DataOrder(["ab"[row % 2] for row in range(17)], [1] * 17, micro_batch_size=4, seed=0)
    datasets = np.repeat([0, 1], sizes) if spans else None
    order = DataOrder(
        ["ab"[row % 2] for row in range(17)], [1] * 17, micro_batch_size=4, seed=0, datasets=datasets, spans=spans
    )
    assert len(order.phases) == 1
    for epoch in range(3):
        assert list(order.epoch(epoch)) == list(plain.epoch(epoch))


def test_a_border_in_epochs_is_at_the_end_of_an_epoch():
    """16 and 8 images of two buckets: 6 micro-batches of 4 an epoch with both, 4 and 2 with one."""
    order = make_phases((16, 8), [span("cats"), span("dogs", "1 epoch", "3 epochs")])
    assert [(phase.first, phase.first_epoch, set(phase.active)) for phase in order.phases] == [
        (0, 0, {0}),
        (4, 1, {0, 1}),
        (4 + 2 * 6, 3, {0}),
    ]
    assert [order.start_of_epoch(epoch) for epoch in range(6)] == [0, 4, 10, 16, 20, 24]
    assert [rows_in(order.epoch(epoch)) == Counter(range(24)) for epoch in range(5)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert rows_in(order.epoch(0)) == rows_in(order.epoch(4)) == Counter(range(16))


def test_a_border_in_steps_cuts_the_epoch():
    order = make_phases((16, 8), [span("cats"), span("dogs", "3 steps")], micro_batches_per_step=2)
    # 6 micro-batches: one whole epoch of 4, and 2 of the next
    assert [(phase.first, phase.first_epoch) for phase in order.phases] == [(0, 0), (6, 2)]
    assert [len(order.epoch(epoch)) for epoch in range(4)] == [4, 2, 6, 6]
    assert [order.start_of_epoch(epoch) for epoch in range(4)] == [0, 4, 6, 12]
    assert rows_in(order.epoch(0)) == Counter(range(16))
    assert set(rows_in(order.epoch(1))) < set(range(16)) and sum(rows_in(order.epoch(1)).values()) == 8
    assert rows_in(order.epoch(2)) == rows_in(order.epoch(3)) == Counter(range(24))
    # what is left of the cut epoch is its beginning
    whole = make_phases((16, 8), [span("cats"), span("dogs", "9 epochs")])
    assert list(order.epoch(1)) == whole.epoch(1)[:2]


def test_a_border_in_steps_at_the_end_of_an_epoch_cuts_nothing():
    order = make_phases((16, 8), [span("cats"), span("dogs", "4 steps")])
    assert [(phase.first, phase.first_epoch) for phase in order.phases] == [(0, 0), (4, 1)]


def test_one_dataset_follows_the_other_and_a_cut_epoch_counts():
    order = make_phases((16, 8, 8), [span("a", end="5 steps"), span("b", "5 steps", "3 epochs"), span("c", "3 epochs")])
    assert [(phase.first, phase.first_epoch, set(phase.active)) for phase in order.phases] == [
        (0, 0, {0}),
        (5, 2, {1}),
        (7, 3, {2}),
    ]


def test_borders_that_change_nothing_cut_nothing():
    """A dataset without images, and one that would end before it begins."""
    spans = [span("cats"), span("empty", "3 steps"), span("never", "9 steps", "5 steps")]
    assert len(make_phases((16, 0, 8), spans).phases) == 1


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("repeats", [1, 2])
def test_full_epochs_have_each_active_sample_exactly_so_often_for_any_number_of_workers(num_workers, repeats):
    spans = [span("cats", end="4 epochs"), span("dogs", "3 steps"), span("birds", "2 epochs")]
    order = make_phases((13, 6, 5), spans, micro_batches_per_step=num_workers, repeats=repeats)
    plan = make_plan(order, num_workers=num_workers, epochs=7)
    steps, position = steps_of(plan)
    assert position == order.start_of_epoch(7)
    assert sorted(numbers(steps)) == list(range(position))
    seen = [Counter() for _ in range(7)]
    for number in numbers(steps):
        micro_batch = order[number]
        assert micro_batch.number == number
        seen[micro_batch.epoch].update(zip(micro_batch.rows, micro_batch.repeats, strict=True))
    rows = {0: range(13), 1: range(13, 19), 2: range(19, 24)}
    num_full = 0
    for epoch, found in enumerate(seen):
        phase = max((phase for phase in order.phases if phase.first_epoch <= epoch), key=lambda phase: phase.first)
        active = {(row, repeat) for dataset in phase.active for row in rows[dataset] for repeat in range(repeats)}
        assert set(found) <= active and set(found.values()) == {1}
        if len(order.epoch(epoch)) == phase.micro_batches_per_epoch:
            num_full += 1
            assert set(found) == active
    assert num_full >= 6  # one border is in steps
    assert {dataset for phase in order.phases for dataset in phase.active} == {0, 1, 2}


@pytest.mark.parametrize("length", [0, 1, 4, 5, 9, 14, 30])
def test_how_many_images_of_each_dataset_are_seen(length):
    spans = [
        span("cats", end="4 epochs"),
        span("dogs", "3 steps"),
        span("birds", "2 epochs"),
        span("never", "99 epochs"),
    ]
    order = make_phases((13, 6, 5, 3), spans, micro_batches_per_step=2, repeats=2)
    rows = [row for number in range(length) for row in order[number].rows]
    expected = [sum(row in range(*part) for row in rows) for part in ((0, 13), (13, 19), (19, 24), (24, 27))]
    assert order.num_seen(length) == expected


def test_borders_in_epochs_do_not_depend_on_the_workers():
    spans = [span("cats"), span("dogs", "2 epochs")]
    orders = [make_phases((13, 6), spans, micro_batches_per_step=count) for count in (1, 6)]
    assert [list(orders[0].epoch(epoch)) for epoch in range(4)] == [list(orders[1].epoch(epoch)) for epoch in range(4)]


@pytest.mark.parametrize("length", [{"epochs": 5}, {"steps": 12}])
def test_a_run_resumed_in_its_second_phase_goes_on_as_if_it_had_not_stopped(length):
    spans = [span("cats"), span("dogs", "4 steps")]

    def order():
        return make_phases((13, 6), spans, micro_batches_per_step=2)

    whole = make_plan(order(), num_workers=2, **length)
    position = 5 * 2
    assert order().phases[1].first < position
    resumed = make_plan(order(), num_workers=2, step=5, position=position, **length)
    assert (resumed.max_steps, resumed.num_micro_batches) == (whole.max_steps, whole.num_micro_batches)
    for rank in range(2):
        expected = [share.micro_batch for share in whole.remaining(0, 0, rank) if share.micro_batch.number >= position]
        assert [share.micro_batch for share in resumed.remaining(0, position, rank)] == expected


def test_items_are_the_epochs_also_across_borders_and_backwards():
    order = make_phases((13, 6), [span("cats", end="5 epochs"), span("dogs", "7 steps")])
    expected = [micro_batch for epoch in range(8) for micro_batch in order.epoch(epoch)]
    assert [micro_batch.number for micro_batch in expected] == list(range(len(expected)))
    assert [order[number] for number in range(len(expected))] == expected
    assert [order[number] for number in reversed(range(len(expected)))] == expected[::-1]


def test_epochs_that_are_done():
    order = make_phases((16, 8), [span("cats"), span("dogs", "6 steps")])
    # epochs of 4, 2 (cut), 6, 6 micro-batches
    assert [order.epochs_at(position) for position in (0, 1, 4, 5, 6, 9, 12)] == [0, 0.25, 1, 1.25, 2, 2.5, 3]
    assert all(order.epochs_at(order.start_of_epoch(epoch)) == epoch for epoch in range(6))


BREAK = [span("cats", end="5 steps"), span("dogs", "8 steps")]


@pytest.mark.parametrize(
    ("spans", "length", "text"),
    [
        (
            BREAK,
            {"steps": 6},
            'from 5 steps on no dataset takes part, but the run goes on:\n  dataset "cats": from the start to 5 steps\n'
            '  dataset "dogs": from 8 steps to the end\nLet one of them begin earlier (dataset.start) or end later '
            "(dataset.end), or shorten train.duration.",
        ),
        (BREAK, {"epochs": 3}, "from 5 steps on no dataset takes part"),
        ([span("cats", end="2 epochs"), span("dogs", end="1 epoch")], {"epochs": 3}, "from 2 epochs on no dataset"),
        ([span("cats", "1 step"), span("dogs", "1 epoch")], {"steps": 1}, "from the start on no dataset takes part"),
        ([span("cats", "1 step"), span("dogs", "1 epoch")], {"epochs": 1}, "from the start on no dataset takes part"),
    ],
)
def test_a_run_without_any_dataset_at_some_border_is_refused(spans, length, text):
    with pytest.raises(ConfigError) as error:
        make_plan(make_phases((16, 8), spans), **length)
    assert str(error.value).startswith(text)


@pytest.mark.parametrize(
    ("spans", "length"),
    [
        (BREAK, {"steps": 5}),
        ([span("cats", end="2 epochs"), span("dogs", end="1 epoch")], {"epochs": 2}),
        ([span("cats", end="8 steps"), span("dogs", end="1 epoch")], {"epochs": 2}),
    ],
)
def test_the_last_dataset_may_end_with_the_run(spans, length):
    plan = make_plan(make_phases((16, 8), spans), **length)
    assert len(list(plan.remaining(0, 0, 0))) == plan.num_micro_batches > 0


def test_a_dataset_without_training_images_is_said_to_be_so():
    with pytest.raises(ConfigError, match='dataset "cats": from the start to the end, but it has no image'):
        make_plan(make_phases((0, 8), [span("cats"), span("dogs", "3 steps")]), steps=1)


@pytest.mark.parametrize("length", [{"steps": 10}, {"epochs": 2}])
def test_a_run_resumed_beyond_its_end_does_nothing_more(length):
    order = make_order({"a": 8})
    plan = make_plan(order, step=12, position=20, **length)
    assert plan.num_micro_batches == 20
    assert steps_of(plan, step=12, position=20) == ([], 20)
