"""Images to rows of columns: what each row says, and that its parts belong together."""

import dataclasses
import hashlib
import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sdxl_ray.cache import collection as collection_module
from sdxl_ray.cache.buckets import Placement
from sdxl_ray.cache.collection import Collection, EncodedWith, collect, sample_identity
from sdxl_ray.cache.images import UnreadableImage
from sdxl_ray.cache.memo import Memo
from sdxl_ray.cache.reading import load_image
from sdxl_ray.cache.scan import scan_images
from sdxl_ray.cache.shards import latent_key, text_key
from sdxl_ray.cache.store import hex_strings
from sdxl_ray.cache.tables import fixed_bytes
from sdxl_ray.errors import DatasetError
from sdxl_ray.records import Listed, bucket_key
from sdxl_ray.storage import open_folder
from tests.unit.cache.planned import add_image, add_images, changed, config_of

FINGERPRINTS = {"vae": "v" * 8, "text": "t" * 8}
ENCODED_WITH = EncodedWith(**FINGERPRINTS, num_chunks=1, text_online=False)


@pytest.fixture
def images(tmp_path):
    return add_images(tmp_path / "images", 9)


@pytest.fixture
def config(tmp_path, images):
    return config_of(tmp_path, "model", images)


def collected(config, *, num_chunks=1, text_online=False, scan=scan_images, **changes):
    config = changed(config, **changes)
    memo = Memo(open_folder(config.cache.path))
    encoded_with = dataclasses.replace(ENCODED_WITH, num_chunks=num_chunks, text_online=text_online)
    return collect(config.datasets, memo, encoded_with=encoded_with, scan=scan)


def rows(collection):
    return collection.table.to_pylist()


def by_name(collection):
    return {Path(row["path"]).name: row for row in rows(collection)}


# ---- one row ---------------------------------------------------------------------------------------------------------


def test_a_row_says_where_the_image_is_and_how_it_is_cut(config, images):
    collection = collected(config)
    assert len(collection) == collection.num_images["images"] == 9
    row = by_name(collection)["00.png"]
    digest = hashlib.sha256((images / "00.png").read_bytes()).digest()
    assert (row["dataset"], row["path"], row["address"], row["verify"]) == ("images", str(images / "00.png"), "", True)
    assert (row["original_height"], row["original_width"]) == (60, 80)
    assert (row["image_hash"], row["flip"], row["mask"]) == (digest, False, "")
    assert row["captions"] == ["caption of 00.png"]
    assert row["text_keys"] == [bytes.fromhex(text_key("caption of 00.png", FINGERPRINTS["text"]))]
    (record,) = collection.records([0], [0])
    assert record.path == row["path"]
    key = latent_key(digest.hex(), record.bucket_hw, record.resized_hw, record.crop_top_left, FINGERPRINTS["vae"])
    assert row["latent_keys"] == [bytes.fromhex(key)]
    assert row["bucket"] == bucket_key(record.bucket_hw)


def test_rows_are_in_the_order_of_the_listing(config):
    assert [Path(row["path"]).name for row in rows(collected(config))] == [f"{number:02d}.png" for number in range(9)]


def test_records_give_back_every_row_in_any_order(config):
    """With flips and random crops: what SDXL is told is mirrored, what is cut out is not."""
    collection = collected(config, dataset__flip=True, dataset__crop="random", dataset__crop_variants=3)
    entries = [
        (number, variant) for number, row in enumerate(rows(collection)) for variant in range(len(row["crop_tops"]))
    ]
    random.Random(0).shuffle(entries)
    records = collection.records(*zip(*entries, strict=True))
    for (number, variant), record, row in zip(
        entries, records, collection.rows([number for number, _ in entries]), strict=True
    ):
        assert row == rows(collection)[number]
        told = (row["crop_tops"][variant], row["crop_lefts"][variant])
        assert record.micro_conditioning.crop_top_left == told
        key = latent_key(
            record.image_hash,
            record.bucket_hw,
            record.resized_hw,
            record.crop_top_left,
            FINGERPRINTS["vae"],
            flip=record.flip,
        )
        assert row["latent_keys"][variant].hex() == key
    assert any(record.flip and record.crop_top_left != record.micro_conditioning.crop_top_left for record in records)


def test_every_image_at_every_resolution_straight_and_mirrored(config):
    collection = collected(config, dataset__resolution=[64, 128], dataset__flip=True)
    assert len(collection) == 9 * 2 * 2
    counts = Counter((Path(row["path"]).name, row["flip"]) for row in rows(collection))
    assert set(counts.values()) == {2}
    keys, lengths = collection.keys("latent_keys")
    assert len(set(keys.tolist())) == 36
    assert lengths.tolist() == [1] * 36
    assert len({row["identity"] for row in rows(collection)}) == 36
    assert len({key for row in rows(collection) for key in row["text_keys"]}) == 9


def test_how_jpegs_are_decoded_is_part_of_the_key(config, images):
    """Of those that it concerns: 600x800 in a bucket of about 64². A large PNG has the same pixels either way."""
    for name in ("a.jpg", "b.JPEG", "c.PNG", "d.webp"):
        add_image(images, name, size=(800, 600))
    plain, shrunk = by_name(collected(config)), by_name(collected(config, dataset__jpeg_scaling=True))
    assert {name for name, row in shrunk.items() if row["scaled_jpeg"]} == {"a.jpg", "b.JPEG"}
    assert not any(row["scaled_jpeg"] for row in plain.values())
    assert {name for name in plain if plain[name]["latent_keys"] != shrunk[name]["latent_keys"]} == {"a.jpg", "b.JPEG"}
    assert {name for name in plain if plain[name]["identity"] != shrunk[name]["identity"]} == {"a.jpg", "b.JPEG"}


def test_what_is_only_evaluated_is_there_once(config):
    """Mirror images and further crops would be encoded for nothing."""
    changes = {"dataset__flip": True, "dataset__crop": "random", "dataset__crop_variants": 3}
    section = changed(config, **changes).datasets[0].model_copy(update={"role": "eval"})
    evaluated = collect([section], Memo(open_folder(config.cache.path)), encoded_with=ENCODED_WITH)
    assert len(evaluated) == 9
    trained = {row["latent_keys"][0] for row in rows(collected(config, **changes)) if not row["flip"]}
    assert {key for row in rows(evaluated) for key in row["latent_keys"]} == trained


def test_what_is_only_evaluated_has_one_caption(config, images):
    (images / "00.txt").write_text("red, round, small\nanother one")
    section = changed(config, dataset__shuffle_tags=True, dataset__caption_variants=4).datasets[0]
    section = section.model_copy(update={"role": "eval"})
    for online in (False, True):
        encoded_with = dataclasses.replace(ENCODED_WITH, text_online=online)
        row = by_name(collect([section], Memo(open_folder(config.cache.path)), encoded_with=encoded_with))["00.png"]
        assert (row["captions"], row["caption_bases"]) == (["red, round, small"], [0])


def test_crop_variants_are_one_row_with_several_latents(config):
    collection = collected(config, dataset__crop="random", dataset__crop_variants=3)
    assert len(collection) == 9
    for row in rows(collection):
        crops = list(zip(row["crop_tops"], row["crop_lefts"], strict=True))
        assert len(crops) == len(set(crops)) == len(set(row["latent_keys"]))
    # more variants leave those that are there as they were
    more = collected(config, dataset__crop="random", dataset__crop_variants=5)
    for row, larger in zip(rows(collection), rows(more), strict=True):
        assert larger["latent_keys"][: len(row["latent_keys"])] == row["latent_keys"]


def test_an_image_without_a_caption_is_left_out_where_that_is_wished(config, images):
    (images / "00.txt").write_text("")
    collection = collected(config, dataset__captions=["textfile", "skip"])
    assert len(collection) == 8
    (skipped,) = collection.skipped
    assert (Path(skipped.path).name, skipped.by_choice) == ("00.png", True)
    assert skipped.reason == 'has no caption, and dataset.captions says "skip"'
    empty = collected(config, dataset__captions=["textfile", "empty"])
    assert by_name(empty)["00.png"]["captions"] == [""]


def test_what_the_settings_do_not_let_one_expect_is_noted(config, images):
    assert collected(config).notes == []
    names = collected(config, dataset__captions=["column", "filename"])
    text = 'dataset "images": no caption is from "column", the first of dataset.captions; 9 from filename'
    assert (names.notes, names.captions_from) == ([text], {"filename": 9})
    assert collected(config, dataset__captions=["textfile", "filename"]).notes == []
    Image.new("L", (8, 8)).save(images / "03-mask.png")
    assert collected(config, dataset__mask="file").notes == [
        'dataset "images": 1 of 9 images have a mask; the others count whole'
    ]


@pytest.mark.parametrize("sizes", [True, False])
def test_a_point_in_pixels_counts_with_the_size_of_the_image(config, images, tmp_path, sizes):
    """The last pixels of an image of 60x80 in a square bucket: with the size in the table, and without."""
    header, values = ("height,width,", "60,80,") if sizes else ("", "")
    table = tmp_path / "list.csv"
    table.write_text(
        f"image,{header}focus_y,focus_x,caption\n{images}/00.png,{values}59,79,a\n{images}/03.png,{values},,b\n"
    )
    collection = collected(
        config,
        dataset__path=str(table),
        dataset__crop="focus",
        dataset__buckets=["square"],
        dataset__identify_by="content",
    )
    assert by_name(collection)["00.png"]["crop_lefts"][0] == by_name(collection)["00.png"]["resized_width"] - 64
    (note,) = collection.notes
    assert note.endswith("1 of 2 images have a point of interest; the others are cut in the middle")


def test_variants_of_captions_have_a_key_each(config, images):
    (images / "00.txt").write_text("red, round, small, shiny, new\nanother one")
    collection = collected(config, dataset__shuffle_tags=True, dataset__caption_variants=4)
    row = by_name(collection)["00.png"]
    assert row["captions"][0] == "red, round, small, shiny, new"  # for evaluation, as it is
    assert row["caption_bases"] == [-1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert row["captions"][5:] == ["another one"] * 4
    assert {", ".join(sorted(caption.split(", "))) for caption in row["captions"]} == {
        "new, red, round, shiny, small",
        "another one",
    }
    assert row["text_keys"] == [bytes.fromhex(text_key(caption, FINGERPRINTS["text"])) for caption in row["captions"]]


def test_captions_that_are_encoded_while_training_have_no_keys_and_stay_as_they_are(config, images):
    (images / "00.txt").write_text("red, round, small, shiny, new")
    changes = {"dataset__shuffle_tags": True, "dataset__caption_variants": 4, "dataset__trigger_word": "ohwx"}
    online = collected(config, text_online=True, **changes)
    assert by_name(online)["00.png"]["captions"] == ["red, round, small, shiny, new"]
    assert by_name(online)["00.png"]["caption_bases"] == [0]
    assert all(row["text_keys"] == [] for row in rows(online))
    keys, lengths = online.keys("text_keys")
    assert (len(keys), lengths.tolist()) == (0, [0] * 9)
    assert [row["identity"] for row in rows(online)] == [row["identity"] for row in rows(collected(config, **changes))]


def test_the_length_of_captions_is_part_of_their_keys(config):
    one, three = collected(config), collected(config, num_chunks=3)
    assert [row["latent_keys"] for row in rows(one)] == [row["latent_keys"] for row in rows(three)]
    assert not {key for row in rows(one) for key in row["text_keys"]} & {
        key for row in rows(three) for key in row["text_keys"]
    }


# ---- what a sample is ------------------------------------------------------------------------------------------------


def identities(collection):
    return [row["identity"] for row in rows(collection)]


def test_a_sample_stays_itself_whatever_encodes_it(config, monkeypatch):
    """With another VAE or dtype, other text encoders, more chunks, another format of shards: its noise is the same."""
    before = collected(config)
    memo = Memo(open_folder(config.cache.path))
    for changes in ({"vae": "w" * 8}, {"text": "u" * 8}, {"num_chunks": 3}, {"text_online": True}):
        encoded_with = dataclasses.replace(ENCODED_WITH, **changes)
        assert identities(collect(config.datasets, memo, encoded_with=encoded_with)) == identities(before)
    monkeypatch.setattr("sdxl_ray.cache.shards.FORMAT_VERSION", "99")
    after = collected(config)
    assert identities(after) == identities(before)
    assert not set(after.keys("latent_keys").values.tolist()) & set(before.keys("latent_keys").values.tolist())


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset__resolution": 72},
        {"dataset__crop": "top_left"},
        {"dataset__trigger_word": "ohwx"},
        {"dataset__mask": "alpha"},
    ],
)
def test_what_the_model_sees_makes_another_sample(config, changes):
    before, after = by_name(collected(config)), by_name(collected(config, **changes))
    changed_ids = {name for name in before if before[name]["identity"] != after[name]["identity"]}
    is_cut = {name for name, row in before.items() if max(row["crop_tops"] + row["crop_lefts"])}
    assert changed_ids == (is_cut if "dataset__crop" in changes else set(before))


def test_all_that_a_sample_is_is_in_its_identity():
    """Each part by itself; an id of this version is the same for ever."""
    place = Placement((64, 72), (70, 80), ((1, 2), (3, 4)))
    arguments = {"image_hash": "ab" * 32, "placement": place, "seen": ["a cat", "cat"]}
    plain = sample_identity(**arguments)
    assert plain.hex() == "116fb23017472b20554d6939"
    others = [
        {"image_hash": "cd" * 32},
        {"placement": dataclasses.replace(place, bucket_hw=(72, 64))},
        {"placement": dataclasses.replace(place, resized_hw=(80, 70))},
        {"placement": dataclasses.replace(place, crops=((1, 2),))},
        {"seen": ["cat", "a cat"]},
        {"flip": True},
        {"mask_hash": "alpha"},
        {"scaled_jpeg": True},
    ]
    found = {sample_identity(**(arguments | other)) for other in others}
    assert len(found) == len(others)
    assert plain not in found


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_a_mask_belongs_to_the_latent_and_only_where_there_is_one(config, images):
    plain = by_name(collected(config))
    add_mask = Image.new("L", (80, 60), 200)
    add_mask.save(images / "00-mask.png")
    masked = by_name(collected(config, dataset__mask="file"))
    assert masked.keys() == plain.keys()
    assert masked["00.png"]["mask"] == str(images / "00-mask.png")
    assert masked["00.png"]["latent_keys"] != plain["00.png"]["latent_keys"]
    assert {name for name, row in masked.items() if row["mask"]} == {"00.png"}
    assert all(masked[name]["latent_keys"] == plain[name]["latent_keys"] for name in plain if name != "00.png")
    Image.new("L", (80, 60), 201).save(images / "00-mask.png")
    digest = hashlib.sha256((images / "00-mask.png").read_bytes()).hexdigest()
    repainted = by_name(collected(config, dataset__mask="file"))
    assert repainted["00.png"]["latent_keys"] != masked["00.png"]["latent_keys"]
    assert repainted["01.png"] == masked["01.png"]
    assert (repainted["00.png"]["mask_hash"], repainted["01.png"]["mask_hash"]) == (digest, "")
    assert repainted["00.png"]["identity"] != masked["00.png"]["identity"]


def test_a_record_knows_the_bytes_of_its_mask(config, images):
    """So that a mask which is edited before the image is decoded is found out."""
    Image.new("L", (80, 60), 255).save(images / "00-mask.png")
    (record, other) = collected(config, dataset__mask="file").records([0, 1], [0, 0])
    assert load_image(record)[1].min() == 255
    assert (other.mask, other.mask_hash) == ("", "")
    Image.new("L", (80, 60), 0).save(images / "00-mask.png")
    with pytest.raises(UnreadableImage, match="changed while it was being cached"):
        load_image(record)


def test_alpha_is_a_mask_of_every_image(config):
    plain, alpha = collected(config), collected(config, dataset__mask="alpha")
    assert {(row["mask"], row["mask_hash"]) for row in rows(alpha)} == {("alpha", "")}
    assert not set(plain.keys("latent_keys").values.tolist()) & set(alpha.keys("latent_keys").values.tolist())


def test_an_image_whose_mask_cannot_be_read_is_skipped(config, images):
    (images / "03-mask.png").write_bytes(b"no image")
    collection = collected(config, dataset__mask="file")
    assert len(collection) == 8
    (item,) = collection.skipped
    assert (item.path, item.by_choice) == (str(images / "03.png"), False)
    assert item.reason == f"its mask {images / '03-mask.png'}: not an image that Pillow can read"


# ---- what is left out ------------------------------------------------------------------------------------------------


def test_what_is_skipped_says_why_and_whether_somebody_chose_it(config, images):
    (images / "00.png").write_bytes(b"no image")
    (images / "01.txt").write_bytes(b"\xe9")
    add_image(images, "tiny.png", size=(20, 20))
    collection = collected(config, dataset__min_size=30)
    assert [(Path(item.path).name, item.dataset, item.by_choice) for item in collection.skipped] == [
        ("00.png", "images", False),
        ("01.png", "images", False),
        ("tiny.png", "images", True),
    ]
    assert collection.skipped[0].reason == "not an image that Pillow can read"
    assert collection.skipped[1].reason.startswith("caption file 01.txt is not UTF-8: byte 0xe9 at offset 0.")
    assert "min_size" in collection.skipped[2].reason
    assert (len(collection), collection.num_images) == (7, {"images": 10})


def test_a_bad_image_needs_no_caption_and_a_good_one_does(config, images):
    (images / "00.png").write_bytes(b"no image")
    (images / "00.txt").unlink()
    assert len(collected(config)) == 8
    for number in range(1, 9):
        (images / f"{number:02d}.txt").write_text("\n")
    with pytest.raises(DatasetError) as error:
        collected(config)
    lines = str(error.value).splitlines()
    assert lines[0] == '8 of 9 images of dataset "images" have no caption:'
    assert lines[1] == f"  {images / '01.png'}"


def test_captions_missing_in_a_later_piece_are_counted_all(config, images, monkeypatch):
    monkeypatch.setattr(collection_module, "PIECE", 2)
    for number in range(9):
        (images / f"{number:02d}.txt").unlink()
    with pytest.raises(DatasetError, match=r'^9 of 9 images of dataset "images" have no caption:'):
        collected(config)


# ---- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 2, 4, 9])
def test_pieces_make_the_same_rows(config, images, monkeypatch, piece):
    (images / "04.png").write_bytes(b"no image")
    changes = {"dataset__flip": True, "dataset__resolution": [64, 96]}
    whole = collected(config, **changes)
    monkeypatch.setattr(collection_module, "PIECE", piece)
    pieces = collected(config, **changes)
    assert rows(pieces) == rows(whole)
    assert pieces.skipped == whole.skipped
    assert pieces.num_images == whole.num_images
    for kind in ("latent_keys", "text_keys"):
        for found, expected in zip(pieces.keys(kind), whole.keys(kind), strict=True):
            assert found.tolist() == expected.tolist()
    wanted = [31, 0, 17, 17, 5]
    assert pieces.records(wanted, [0] * 5) == whole.records(wanted, [0] * 5)
    kept = np.arange(len(whole)) % 3 == 0
    pieces.keep(kept)
    whole.keep(kept)
    assert rows(pieces) == rows(whole)
    assert pieces.records([1, 2], [0, 0]) == whole.records([1, 2], [0, 0])


def test_nothing_is_an_empty_collection():
    collection = Collection()
    assert len(collection) == 0
    assert [part.tolist() for part in collection.keys("latent_keys")] == [[], []]
    assert collection.records([], []) == []
    assert collected_nothing() == []


def collected_nothing():
    collection = collect([], Memo(open_folder("/nowhere")), encoded_with=ENCODED_WITH)
    return rows(collection)


def test_bytes_of_one_width_come_back_with_zeros_at_their_ends():
    values = [bytes(12), b"\1" + bytes(11), b"x" * 12, bytes(11) + b"\1"]
    array = pa.array(values, pa.binary(12))
    assert [each.ljust(12, b"\0") for each in fixed_bytes(array, 12).tolist()] == values
    assert fixed_bytes(array.slice(1, 2), 12).tobytes() == b"".join(values[1:3])
    assert hex_strings(fixed_bytes(array, 12)).to_pylist() == [value.hex() for value in values]
    assert hex_strings(fixed_bytes(array.slice(4), 12)).to_pylist() == []


def test_a_row_takes_a_few_hundred_bytes(config, images):
    """Ten million have to fit on the driver."""
    for number in range(9, 99):
        add_image(images, f"{number:02d}.png", colour=number)
    collection = collected(config)
    assert collection.table.nbytes / len(collection) < 280 + len(str(images))


# ---- the memo --------------------------------------------------------------------------------------------------------


def opened_by(config, **changes):
    """The names of the files that are opened."""
    opened = []

    def scan(files, *, max_pixels, by_listing):
        opened.extend(Path(file.path).name for file in files)
        return scan_images(files, max_pixels=max_pixels, by_listing=by_listing)

    return opened, collected(config, scan=scan, **changes)


def test_a_second_run_opens_no_image(config, images):
    (images / "00.png").write_bytes(b"no image")
    Image.new("L", (60, 80), 200).save(images / "01-mask.png")
    first, before = opened_by(config, dataset__mask="file")
    assert sorted(first) == sorted([*(f"{number:02d}.png" for number in range(9)), "01-mask.png"])
    again, after = opened_by(config, dataset__mask="file")
    assert again == []
    assert rows(after) == rows(before)


def test_two_sections_over_one_folder_read_it_once(config, images, tmp_path):
    opened, collection = opened_by(config_of(tmp_path, "model", images, images))
    assert sorted(opened) == [f"{number:02d}.png" for number in range(9)]
    assert len(collection) == 18


def test_what_an_interrupted_scan_has_found_is_remembered(config):
    """That of a web server's images takes hours."""

    def interrupted(files, *, max_pixels, by_listing):
        for file in files[:4]:
            yield from scan_images([file], max_pixels=max_pixels, by_listing=by_listing[:1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected(config, scan=interrupted)
    opened, collection = opened_by(config)
    assert opened == [f"{number:02d}.png" for number in range(4, 9)]
    assert len(collection) == 9


def test_a_long_scan_is_written_down_while_it_runs(config, monkeypatch):
    """A machine may lose its power."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    on_disk = []

    def slow(files, *, max_pixels, by_listing):
        for file in files:
            now[0] += 20
            memo = Memo(open_folder(config.cache.path))
            on_disk.append(sum(found is not None for found in memo.find(files, by_listing, max_pixels)))
            yield from scan_images([file], max_pixels=max_pixels, by_listing=by_listing[:1])

    assert len(collected(config, scan=slow)) == 9
    assert on_disk == [0, 0, 0, 0, 4, 4, 4, 4, 8]


def test_what_was_found_before_an_error_is_remembered(config, images):
    for number in range(9):
        (images / f"{number:02d}.txt").unlink()
    with pytest.raises(DatasetError):
        opened_by(config)
    for number in range(9):
        (images / f"{number:02d}.txt").write_text("now it has one")
    assert opened_by(config)[0] == []


def test_only_what_changed_is_opened_again(config, images):
    opened_by(config)
    add_image(images, "03.png", size=(70, 60), colour=99)
    add_image(images, "new.png", colour=98)
    assert opened_by(config)[0] == ["03.png", "new.png"]


def test_the_limit_on_pixels_is_never_remembered_wrongly(config):
    opened_by(config)
    opened, collection = opened_by(config, dataset__max_pixels=64 * 64)
    assert len(opened) == 6
    assert len(collection) == 3
    assert {item.reason for item in collection.skipped} == {
        f"{size} pixels (height x width) is more than dataset.max_pixels = 4096" for size in ("80x60", "60x80")
    }
    assert len(opened_by(config)[1]) == 9


# ---- identity by the listing -----------------------------------------------------------------------------------------


def write_table(folder, images, **changes):
    """A list of images with their sizes, as annotators hand out."""
    lines = []
    for path in sorted(images.glob("*.png")):
        width, height = Image.open(path).size
        row = {"image": str(path), "caption": f"row of {path.name}", "height": height, "width": width, **changes}
        lines.append(json.dumps({name: value for name, value in row.items() if value is not None}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "list.jsonl").write_text("\n".join(lines))
    return folder / "list.jsonl"


def test_where_a_table_knows_the_sizes_nothing_is_opened(tmp_path, images, monkeypatch):
    config = config_of(tmp_path, "model", write_table(tmp_path / "lists", images))
    with monkeypatch.context() as patch:
        patch.setattr("sdxl_ray.cache.scan.read_bytes", lambda address: pytest.fail(f"opened {address}"))
        patch.setattr("sdxl_ray.cache.scan.read_start", lambda address, length: pytest.fail(f"opened {address}"))
        collection = collected(config)
    assert [row["captions"] for row in rows(collection)] == [[f"row of {number:02d}.png"] for number in range(9)]
    assert not any(row["verify"] for row in rows(collection))
    assert not collection.records([0], [0])[0].verify
    by_content = collected(config, dataset__identify_by="content")
    assert all(row["verify"] for row in rows(by_content))
    assert not set(by_content.keys("latent_keys").values.tolist()) & set(collection.keys("latent_keys").values.tolist())
    shapes = [(row["original_height"], row["original_width"], row["bucket"]) for row in rows(collection)]
    assert shapes == [(row["original_height"], row["original_width"], row["bucket"]) for row in rows(by_content)]


def test_the_point_of_interest_moves_the_crop(tmp_path, images):
    low = write_table(tmp_path / "low", images, focus_y=0.0, focus_x=0.0)
    high = write_table(tmp_path / "high", images, focus_y=1.0, focus_x=1.0)
    crops = [
        [
            (row["crop_tops"], row["crop_lefts"])
            for row in rows(collected(config_of(tmp_path, "model", table, crop="focus", buckets=("64x64",))))
        ]
        for table in (low, high)
    ]
    assert crops[0] == [([0], [0])] * 9
    assert crops[1][0] != ([0], [0])


# ---- who belongs to whom ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("piece", [100_000, 7])
def test_every_image_keeps_its_own_caption_whatever_lies_between(tmp_path, monkeypatch, seed, piece):
    """60 good images in three datasets, among them ones that cannot be read and ones whose captions cannot."""
    monkeypatch.setattr(collection_module, "PIECE", piece)
    draw = random.Random(seed)
    kinds = ["good"] * 60 + ["bad image"] * 15 + ["bad caption"] * 15 + ["small"] * 10
    draw.shuffle(kinds)
    folders = [tmp_path / name for name in ("cats", "dogs", "more cats")]
    expected, bad = {}, {}
    for number, kind in enumerate(kinds):
        folder = draw.choice(folders) / draw.choice(("", "a", "z", "a/b"))
        size = (20, 20) if kind == "small" else draw.choice([(80, 60), (60, 80), (64, 64)])
        path = add_image(folder, f"{draw.randrange(10**6)}-{number}.png", size=size, colour=number * 7, caption="x")
        captions = [f"caption {number}.{line}" for line in range(draw.choice((1, 1, 3)))]
        path.with_suffix(".txt").write_text("\n".join(captions), encoding="utf-8")
        if kind == "bad image":
            path.write_bytes(draw.choice((b"", b"no image", path.read_bytes()[:20])))
        if kind == "bad caption":
            path.with_suffix(".txt").write_bytes(draw.choice((b"\xe9", b"a\0b", b"\xff\xfe\x00")))
        if kind == "good":
            expected[hashlib.sha256(path.read_bytes()).digest()] = (str(path), captions)
        else:
            bad[str(path)] = kind
    collection = collected(config_of(tmp_path, "model", *folders, min_size=30))
    assert {row["image_hash"]: (row["path"], row["captions"]) for row in rows(collection)} == expected
    assert len(collection) == 60
    assert {item.path: item.by_choice for item in collection.skipped} == {
        path: kind == "small" for path, kind in bad.items()
    }
    for row in rows(collection):
        assert Path(row["path"]).is_relative_to(tmp_path / row["dataset"])
        assert row["text_keys"] == [
            bytes.fromhex(text_key(caption, FINGERPRINTS["text"])) for caption in row["captions"]
        ]
    names = [item.dataset for item in collection.skipped] + [row["dataset"] for row in rows(collection)]
    assert collection.num_images == Counter(names)


def test_a_mask_is_identified_by_its_content_whatever_identifies_the_images(config, images):
    """Else it would not be the one that was scanned when the image is decoded."""
    Image.new("L", (80, 60), 200).save(images / "00-mask.png")
    found = by_name(collected(config, dataset__mask="file", dataset__identify_by="listing"))
    digest = hashlib.sha256((images / "00-mask.png").read_bytes()).hexdigest()
    assert found["00.png"]["mask_hash"] == digest


def test_a_mask_that_its_source_says_has_changed_is_looked_at_again(config, images, monkeypatch):
    """In a bucket it changes while its image stays as it is."""
    mask = images / "mask.bmp"
    hashes = []
    for stamp in ("1", "2"):
        Image.new("L", (80, 60), int(stamp)).save(mask)
        os.utime(mask, (1e9, 1e9))
        file = Listed(str(images / "00.png"), "1", texts=("a cat",), mask_file=str(mask), mask_stamp=stamp)
        monkeypatch.setattr(collection_module, "list_dataset", lambda section, memo, file=file: iter([file]))
        (row,) = rows(collected(config, dataset__mask="file"))
        hashes.append(row["mask_hash"])
        assert hashes[-1] == hashlib.sha256(mask.read_bytes()).hexdigest()
    assert hashes[0] != hashes[1]


def test_images_that_the_listing_identifies_and_others_are_remembered_as_what_they_are(tmp_path, images):
    """A table with sizes in some of its rows, to which one without is added."""
    table = write_table(tmp_path / "lists", images)
    lines = table.read_text().splitlines()
    config = config_of(tmp_path, "model", table)
    table.write_text("\n".join(lines[:3]))
    collected(config)
    table.write_text("\n".join([*lines[:3], lines[3].replace('"height"', '"tallness"')]))
    assert [row["verify"] for row in rows(collected(config))] == [False, False, False, True]

    def none_is_new(files, **settings):
        raise AssertionError(f"scanned again: {[file.path for file in files]}")

    assert len(collected(config, scan=none_is_new)) == 4
