import dataclasses
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdxl_ray.cache.index import SCHEMA, Index, digest_of, write_index
from sdxl_ray.errors import CacheError, StorageError
from sdxl_ray.records import EncodedSample


def sample(number=0, **changes):
    made = EncodedSample(
        sample_id=f"{number:024x}",
        dataset="cats",
        path=f"/images/猫 {number}.jpg",
        address="",
        image_hash=f"{number:064x}",
        verify=True,
        original_hw=(100 + number, 200),
        target_hw=(64, 128),
        resized_hw=(64, 130),
        crops=((0, number), (0, 2)),
        flip=False,
        mask="",
        captions=("a cat", "two\nlines"),
        scaled_jpeg=False,
        caption_bases=(-1, 0),
        latent_keys=(f"{number:032x}", "ab" * 16),
        latent_shards=("latents/64x128/x.safetensors", "latents/64x128/y.safetensors"),
        text_keys=("cd" * 16, "ef" * 16),
        text_shards=("text/x.safetensors", "text/x.safetensors"),
    )
    return dataclasses.replace(made, **changes)


SAMPLES = [
    sample(1),
    sample(0, dataset="dogs", address="tar:512+99:/data/0.tar", verify=False),
    sample(
        2, target_hw=(128, 64), resized_hw=(130, 64), crops=((1, 0),), latent_keys=("0" * 32,), latent_shards=("x",)
    ),
    sample(3, flip=True, mask="alpha", sample_id="3" * 24 + "-2"),
    sample(4, mask="/masks/cat\n4.png", latent_shards=("", "")),  # cache.mode = "off"
    sample(5, text_keys=(), text_shards=()),  # cache.text = "online"
    sample(6, captions=("",), text_keys=("0" * 32,), text_shards=("t",)),
]


def written(tmp_path, samples, pieces=1):
    path = f"{tmp_path}/datasets/cats=1/index.parquet"
    size = -(-len(samples) // pieces)
    tables = [Index.of(samples[start : start + size]).table for start in range(0, len(samples), size)]
    write_index(path, tables)
    return path


@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_the_index_gives_back_what_was_written(tmp_path, pieces):
    path = written(tmp_path, SAMPLES, pieces)
    index = Index.read(path)
    assert len(index) == len(SAMPLES)
    assert [index[row] for row in range(len(SAMPLES))] == SAMPLES
    assert [file.name for file in (tmp_path / "datasets" / "cats=1").iterdir()] == ["index.parquet"]


def test_an_index_in_memory_is_the_same_as_one_that_was_read(tmp_path):
    index = Index.of(SAMPLES)
    assert [index[row] for row in range(len(index))] == SAMPLES
    assert index.codes("bucket")[1] == Index.read(written(tmp_path, SAMPLES)).codes("bucket")[1]


def test_dictionaries_are_written_as_plain_columns(tmp_path):
    table = Index.of(SAMPLES).table.cast(SCHEMA)
    assert pa.types.is_dictionary(table.schema.field("bucket").type)
    write_index(f"{tmp_path}/index.parquet", [table, table])
    index = Index.read(tmp_path / "index.parquet")
    assert [index[row] for row in range(len(index))] == SAMPLES * 2


def test_the_index_is_a_plain_table(tmp_path):
    rows = pq.read_table(written(tmp_path, SAMPLES)).to_pylist()
    assert list(rows[0]) == SCHEMA.names
    assert (rows[0]["bucket"], rows[0]["original_height"], rows[0]["crop_lefts"]) == ("64x128", 101, [1, 2])
    assert rows[0]["captions"] == ["a cat", "two\nlines"]
    assert rows[0]["latent_shards"] == ["latents/64x128/x.safetensors", "latents/64x128/y.safetensors"]


def test_an_empty_index(tmp_path):
    write_index(f"{tmp_path}/index.parquet", [])
    index = Index.read(f"{tmp_path}/index.parquet")
    for each in (index, Index.of([])):
        assert len(each) == 0
        assert [part.tolist() if isinstance(part, np.ndarray) else part for part in each.codes("bucket")] == [[], []]
        assert each.sample_ids().tolist() == each.image_hashes().tolist() == each.flags("flip").tolist() == []


@pytest.mark.parametrize("pieces", [1, 3])
def test_columns_are_numbers(tmp_path, pieces):
    index = Index.read(written(tmp_path, SAMPLES, pieces))
    codes, buckets = index.codes("bucket")
    assert codes.dtype == np.int32
    assert (codes.tolist(), buckets) == ([1, 1, 0, 1, 1, 1, 1], ["128x64", "64x128"])
    assert index.codes("dataset")[1] == ["cats", "dogs"]
    assert index.flags("flip").tolist() == [False] * 3 + [True] + [False] * 3
    assert index.sample_ids().tolist() == [each.sample_id.encode() for each in SAMPLES]
    assert index.image_hashes().tolist() == [each.image_hash.encode() for each in SAMPLES]
    assert index.image_hashes().dtype == "S64"


def test_columns_of_a_table_in_pieces_and_of_a_slice():
    """As the planner has it, before it is written; each piece has a dictionary of its own."""
    tables = [Index.of([each]).table.cast(SCHEMA) for each in SAMPLES]
    index = Index(pa.concat_tables(tables))
    assert index.codes("bucket")[0].tolist() == [1, 1, 0, 1, 1, 1, 1]
    assert index.codes("dataset")[0].tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert [index[row] for row in range(7)] == SAMPLES
    sliced = Index(pa.concat_tables(tables).combine_chunks().slice(2, 3))
    assert sliced.sample_ids().tolist() == [each.sample_id.encode() for each in SAMPLES[2:5]]
    assert sliced.image_hashes().tolist() == [each.image_hash.encode() for each in SAMPLES[2:5]]
    assert sliced.codes("bucket")[0].tolist()[0] == 0
    assert [sliced[row] for row in range(3)] == SAMPLES[2:5]


def test_codes_are_those_of_the_sorted_names_whatever_comes_first():
    """Ranks number buckets alike, although each has its rows in an order of its own."""
    forth, back = Index.of(SAMPLES), Index.of(SAMPLES[::-1])
    assert forth.codes("bucket")[1] == back.codes("bucket")[1]
    assert forth.codes("bucket")[0].tolist() == back.codes("bucket")[0].tolist()[::-1]


def test_the_placement_of_a_flipped_image_comes_back_from_what_sdxl_is_told():
    flipped = sample(3, flip=True, crops=((0, 2), (0, 0)))
    record = Index.of([flipped])[0].image_record(0)
    assert record.crop_top_left == (0, 0)  # 130 - 128 - 2: before it is mirrored
    assert record.micro_conditioning == flipped.micro_conditioning(0)


def test_a_million_rows_are_columns_and_not_objects(tmp_path):
    """That would be two gigabytes in every worker."""
    table = Index.of([sample(number) for number in range(100)]).table
    write_index(f"{tmp_path}/index.parquet", [table] * 300)
    tracemalloc.start()
    index = Index.read(f"{tmp_path}/index.parquet")
    before = tracemalloc.get_traced_memory()[0]
    codes, _ = index.codes("bucket")
    assert len(codes) == 30_000
    assert index[29_999] == sample(99)
    python_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert python_bytes - before < 30_000 * 8
    assert index.table.nbytes < 30_000 * 600
    assert sys.getsizeof(index.sample_ids()) < 30_000 * 30


def test_no_index_and_a_damaged_one(tmp_path):
    path = tmp_path / "index.parquet"
    with pytest.raises(CacheError) as error:
        Index.read(path)
    assert str(error.value) == f"{path}: no index. Run `sdxl-ray cache` with this config first."
    for content in (b"", b"PAR1 and so on", b"PAR1" + bytes(99) + b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(CacheError) as error:
            Index.read(path)
        assert str(error.value).startswith(f"{path}: is damaged (")
        assert str(error.value).endswith("). Run `sdxl-ray cache`: the index is written anew.")
        assert "\n" not in str(error.value)


def test_an_index_of_another_version(tmp_path):
    """As the first release wrote it, with rows in place of keys."""
    path = tmp_path / "index.parquet"
    table = Index.of(SAMPLES).table.drop_columns(["mask", "latent_keys"])
    pq.write_table(table.append_column("latent_row", pa.array([3] * len(table))), path)
    with pytest.raises(CacheError) as error:
        Index.read(path)
    assert str(error.value) == (
        f"{path}: is of another version of sdxl-ray, it lacks mask, latent_keys. "
        "Run `sdxl-ray cache`: the index is written anew."
    )


@pytest.mark.parametrize("name", [name for name in SCHEMA.names if name != "mask_hash"])
def test_without_any_of_its_columns_it_is_no_index(tmp_path, name):
    path = tmp_path / "index.parquet"
    pq.write_table(Index.of(SAMPLES).table.drop_columns([name]), path)
    with pytest.raises(CacheError, match=rf"is of another version of sdxl-ray, it lacks {name}\. "):
        Index.read(path)


def test_the_copy_of_an_earlier_version_is_read(tmp_path):
    """A run has its own, and needs it when it is resumed or exported."""
    path = tmp_path / "index.parquet"
    table = Index.of([sample(0, mask_hash="")]).table.drop_columns(["mask_hash"])
    pq.write_table(table, path)
    assert Index.read(path)[0] == sample(0, mask_hash="")


@pytest.mark.parametrize("name", ["a\nb 😺.png", "x" * 255, "tab\there", '"quoted", comma', "\u202eright to left"])
def test_names_survive(tmp_path, name):
    made = sample(0, path=f"/images/{name}", dataset=name, captions=(name, ""), mask=name)
    write_index(f"{tmp_path}/index.parquet", [Index.of([made]).table])
    assert Index.read(f"{tmp_path}/index.parquet")[0] == made


def test_a_full_disk_leaves_the_index_that_was_there(tmp_path, monkeypatch):
    path = written(tmp_path, SAMPLES)

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(StorageError, match="no space left on the device"):
        write_index(path, [Index.of([sample(9)]).table])
    assert len(Index.read(path)) == len(SAMPLES)
    assert [file.name for file in (tmp_path / "datasets" / "cats=1").iterdir()] == ["index.parquet"]


def test_images_are_counted_once_in_each_dataset():
    hashes = [f"{number:016x}" + "0" * 48 for number in range(3)]
    samples = [sample(number, image_hash=each) for number, each in enumerate(hashes)]
    index = Index.of(
        [*samples, sample(3, image_hash=hashes[0], flip=True), sample(4, image_hash="1" * 64, dataset="dogs")]
    )
    assert index.num_images() == {"cats": 3, "dogs": 1}
    assert index.num_crops().tolist() == [2] * 5


def test_an_empty_index_has_no_images():
    index = Index(SCHEMA.empty_table())
    assert (index.num_images(), index.num_crops().tolist()) == ({}, [])


# ---- digest ----------------------------------------------------------------------------------------------------------


def test_a_digest_is_of_what_the_rows_say_however_they_are_held(tmp_path):
    table = Index.of(SAMPLES).table
    digest = digest_of([table])
    assert digest_of([table.slice(0, 1), table.slice(1)]) == digest
    assert digest_of([pa.concat_tables([table.slice(row, 1) for row in range(len(table))])]) == digest
    path = f"{tmp_path}/index.parquet"
    write_index(path, [table])
    assert digest_of([Index.read(path).table]) == digest
    for name in ("dataset", "bucket"):  # numbered the other way round
        names = sorted({*table.column(name).to_pylist(), "another"}, reverse=True)
        codes = pa.array([names.index(value) for value in table.column(name).to_pylist()], pa.int32())
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.field(name), pa.DictionaryArray.from_arrays(codes, names))
    assert digest_of([table]) == digest
    assert digest_of([]) == digest_of([Index.of([]).table]) != digest


@pytest.mark.parametrize("name", SCHEMA.names)
def test_every_value_of_every_column_counts(name):
    kind = SCHEMA.field(name).type
    values = {pa.string(): ["ab", "c"], pa.bool_(): [False, True], pa.int32(): [1, 2]}
    plain = kind.value_type if pa.types.is_list(kind) or pa.types.is_dictionary(kind) else kind
    first, second = values[plain]
    rows = [[first], [first, second], [], [first, first]] if pa.types.is_list(kind) else [first, second, first]
    others = [list(reversed(rows)), rows[:-1], [rows[0], *rows[:-1]]]
    if plain == pa.string() and kind == plain:
        others.append(["a", "bc", "ab"])  # the same text, cut elsewhere
    if pa.types.is_list(kind):
        others.append([[first, first], [second], [], [first, first]])
    table = Index.of([sample(0)]).table

    def digest(values):
        repeated = pa.concat_tables([table] * len(values)).unify_dictionaries()
        column = pa.array(values, pa.list_(plain) if pa.types.is_list(kind) else plain).cast(kind)
        return digest_of([repeated.set_column(table.schema.get_field_index(name), table.field(name), column)])

    digests = [digest(values) for values in (rows, *others) if values is rows or values != rows]
    assert len(set(digests)) == len(digests) > 2
