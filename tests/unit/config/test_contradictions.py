import pytest

from sdxl_ray.config.contradictions import contradictions
from sdxl_ray.config.load import config_from_dict
from sdxl_ray.errors import ConfigError


def problems(raw):
    with pytest.raises(ConfigError) as error:
        config_from_dict(raw)
    return str(error.value)


@pytest.mark.parametrize(
    ("raw", "key", "text"),
    [
        (
            {"lr_schedule": {"warmup": "11 steps"}, "train": {"duration": "10 steps"}},
            "lr_schedule.warmup",
            '"11 steps" is longer than train.duration = "10 steps"',
        ),
        ({"train": {"duration": "0 steps"}}, "train.duration", "must be at least 1 step or 1 epoch"),
        ({"eval": {"every": "0 epochs"}}, "eval.every", "must be at least 1 step or 1 epoch"),
        ({"validation": {"every": "0 steps"}}, "validation.every", "must be at least 1 step or 1 epoch"),
        ({"checkpoint": {"every": "0 steps"}}, "checkpoint.every", "must be at least 1 step or 1 epoch"),
        (
            {"eval": {"holdout": 0.0}, "sweep": {"parameters": {"adapter.rank": {"grid": [4, 8]}}}},
            "eval.holdout",
            "is 0, but sweep.metric needs an eval loss. Set eval.holdout = 0.05, say, or give a dataset "
            'dataset.role = "eval".',
        ),
        (
            {"cache": {"num_encoders": 4, "max_encoders": 3}},
            "cache.max_encoders",
            "is 3, below cache.num_encoders = 4",
        ),
    ],
)
def test_settings_that_are_fine_alone_but_not_together(raw, key, text):
    assert problems(raw) == f"given: {key}: {text}"


@pytest.mark.parametrize(
    ("dataset", "name", "text"),
    [
        (
            {"captions": ["textfile", "json"]},
            "captions",
            '"json" is not a source; known: textfile, column, filename, instance_prompt, empty, skip',
        ),
        *(
            (
                {"caption_extension": extension},
                "caption_extension",
                f'is "{extension}", but caption files are read as plain text, whole. Write the captions into a table '
                "beside the images (metadata.jsonl); of a WebDataset the .json is read by dataset.captions = "
                '["column"].',
            )
            for extension in (".json", "_notes.JSON", ".npz", ".jpg")
        ),
        (
            {"captions": ["textfile", "empty", "skip"]},
            "captions",
            '"empty" decides about images without a caption: nothing can come after it',
        ),
        (
            {"captions": ["skip", "textfile"]},
            "captions",
            '"skip" decides about images without a caption: nothing can come after it',
        ),
        ({"captions": ["column", "textfile", "column"]}, "captions", '"column" is there twice'),
        *(
            (
                {"captions": [other], name: value},
                name,
                f'is set, but dataset.captions never uses it. Add "{needs}" to dataset.captions.',
            )
            for name, value, needs, other in (
                ("caption_columns", ["words"], "column", "textfile"),
                ("caption_lists", "tags", "column", "textfile"),
                ("caption_lines", "whole", "textfile", "column"),
                ("caption_extension", ".caption", "textfile", "column"),
            )
        ),
        ({"captions": ["skip"]}, "captions", 'is only "skip", which leaves out every image. Put a source before it.'),
        (
            {"path": "s3:/bucket/dogs"},
            "path",
            "names a folder of this machine called s3:, which is not there. Write s3://...",
        ),
        (
            {"path": "hf:org/dogs"},
            "path",
            "names a folder of this machine called hf:, which is not there. Write hf://...",
        ),
        (
            {"captions": ["instance_prompt"]},
            "instance_prompt",
            'is empty, but dataset.captions has "instance_prompt". Write the prompt.',
        ),
        (
            {"instance_prompt": "a cat"},
            "instance_prompt",
            'is set, but dataset.captions never uses it. Add "instance_prompt" to dataset.captions.',
        ),
        (
            {"caption_replace": [["cat", "dog"], ["(cat", ""]]},
            "caption_replace",
            "'(cat' is not a regular expression: missing ), unterminated subpattern at position 0",
        ),
        (
            {"caption_replace": [["(cat)", r"\2"]]},
            "caption_replace",
            r"'\\2' cannot take the place of '(cat)': invalid group reference 2 at position 1",
        ),
        (
            {"caption_replace": [["\bcat", ""]]},
            "caption_replace",
            r"'\x08cat' holds a backspace: TOML's meaning of \b in double quotes. Write it in single quotes.",
        ),
        ({"resolution": 1000}, "resolution", "1000 is not a multiple of dataset.bucket_step = 64"),
        (
            {"resolution": [1024, 1001], "resolution_unit": "shorter_side"},
            "resolution",
            "a shorter side of 1001 is not a multiple of 8 pixels",
        ),
        (
            {"resolution": 0.06, "resolution_unit": "megapixels", "bucket_step": 256},
            "resolution",
            "0.06 megapixels is less than one bucket of dataset.bucket_step = 256: raise the one, or lower the other",
        ),
        (
            {"resolution": 32, "bucket_step": 8},
            "resolution",
            '32 is not a whole number of at least 64 pixels (dataset.resolution_unit = "edge").',
        ),
        (
            {"resolution": [1024, 1e9]},
            "resolution",
            '1000000000 is above 4096 pixels: SDXL was made for 1024 (dataset.resolution_unit = "edge")',
        ),
        (
            {"resolution": 1.5},
            "resolution",
            '1.5 is not a whole number of at least 64 pixels (dataset.resolution_unit = "edge"). For megapixels: '
            'dataset.resolution_unit = "megapixels".',
        ),
        (
            {"resolution": 1024, "resolution_unit": "megapixels"},
            "resolution",
            '1024 is not between 0.05 and 8 megapixels (dataset.resolution_unit = "megapixels"). For pixels: '
            'dataset.resolution_unit = "edge".',
        ),
        (
            {"resolution": 0.01, "resolution_unit": "megapixels"},
            "resolution",
            '0.01 is not between 0.05 and 8 megapixels (dataset.resolution_unit = "megapixels").',
        ),
        (
            {"resolution": [1024, 512, 1024]},
            "resolution",
            "1024 is there twice. These are several sizes of each image, not width and height. To see images more "
            "often, set dataset.repeats.",
        ),
        (
            {"buckets": ["1024x1024", "1000x1020"]},
            "buckets",
            '"1000x1020" is not HEIGHTxWIDTH in multiples of 8 pixels, such as "832x1216"',
        ),
        (
            {"buckets": ["0x64"]},
            "buckets",
            '"0x64" is not HEIGHTxWIDTH in multiples of 8 pixels, such as "832x1216"',
        ),
        ({"buckets": ["square", "64x64"]}, "buckets", '"square" stands alone: dataset.buckets = ["square"]'),
        (
            {"buckets": ["64x128"], "resolution": [512, 1024]},
            "resolution",
            "has several sizes, but dataset.buckets leaves no choice. Remove one of the two.",
        ),
        ({"buckets": ["64x128", "64x128"]}, "buckets", '"64x128" is there twice'),
        (
            {"min_size": 900, "max_size": 800},
            "min_size",
            "is 900, above dataset.max_size = 800: no image is left",
        ),
        *(
            (
                {"upscale": False, "max_upscale": value},
                "max_upscale",
                f"is {value:g}, but dataset.upscale = false enlarges no image. Remove dataset.max_upscale.",
            )
            for value in (0.0, 0.5, 4.0)
        ),
        (
            {"max_upscale": 0.5},
            "max_upscale",
            "is 0.5, below 1: images that need no enlarging would be skipped too. Set 1 or more; dataset.min_size "
            "skips small images.",
        ),
        (
            {"min_aspect": 2.0, "max_aspect": 0.5},
            "min_aspect",
            "is 2.0, above dataset.max_aspect = 0.5: no image is left",
        ),
        (
            {"crop_variants": 4},
            "crop_variants",
            'is 4, but dataset.crop = "center" cuts at one place. Set dataset.crop = "random".',
        ),
        (
            {"crop": "random", "crop_epochs": 3},
            "crop_epochs",
            "is 3, but dataset.crop_variants = 1: there is no next crop",
        ),
        (
            {"shuffle_tags": True},
            "caption_variants",
            "is 1, but with dataset.shuffle_tags or dataset.tag_dropout every epoch would see the same order. Set it "
            'to 8, say; or cache.text = "online", which makes a new variant each time.',
        ),
        (
            {"caption_variants": 8},
            "caption_variants",
            "is 8, but all variants would be the same. Set dataset.shuffle_tags = true or dataset.tag_dropout.",
        ),
        (
            {"keep_tags": 2},
            "keep_tags",
            "is 2, but all tags stay as they are. Set dataset.shuffle_tags = true or dataset.tag_dropout.",
        ),
        (
            {"mask_suffix": "_m.png"},
            "mask_suffix",
            'is set, but dataset.mask = "none" does not use it. Set dataset.mask = "file".',
        ),
        (
            {"mask": "alpha", "mask_column": "matte"},
            "mask_column",
            'is set, but dataset.mask = "alpha" does not use it. Set dataset.mask = "file".',
        ),
        (
            {"crop": "focus", "focus_columns": ["y"]},
            "focus_columns",
            "must be two names, of the columns with y and x, for dataset.crop = \"focus\"; found ['y']",
        ),
        (
            {"size_columns": ["height", "width", "depth"]},
            "size_columns",
            "must be two names, of the columns with height and width, or none; found ['height', 'width', 'depth']",
        ),
        (
            {"revision": "v2"},
            "revision",
            "is set, but dataset.path is not a Hugging Face dataset: hf://org/name",
        ),
        ({"start": "10 steps", "end": "10 steps"}, "end", '"10 steps" is not after dataset.start = "10 steps"'),
        (
            {"start": "3 epochs", "end": "2 epochs"},
            "end",
            '"2 epochs" is not after dataset.start = "3 epochs"',
        ),
        (
            {"start": "2000 steps"},
            "start",
            '"2000 steps" is not before the end of the run: train.duration = "2000 steps"',
        ),
    ],
)
def test_settings_of_one_dataset(dataset, name, text):
    """Of the second of two, so that each problem has to say which."""
    raw = {"dataset": [{"path": "cats"}, {"path": "dogs", **dataset}]}
    assert problems(raw) == f"given: dataset 2 (dogs): dataset.{name}: {text}"


@pytest.mark.parametrize(
    ("name", "value"), [("repeats", 2), ("weight", 0.5), ("start", "1 epoch"), ("end", "100 steps")]
)
def test_an_eval_dataset_takes_no_turns(name, value):
    raw = {"dataset": [{"path": "cats"}, {"path": "dogs", "role": "eval", name: value}]}
    assert problems(raw) == (
        f'given: dataset 2 (dogs): dataset.{name}: is set, but dataset.role = "eval": the eval loss always takes each '
        f"image once. Remove dataset.{name}."
    )


def test_variants_are_either_in_the_cache_or_made_while_training():
    dataset = {"shuffle_tags": True, "caption_variants": 4}
    assert problems({"dataset": dataset, "cache": {"text": "online"}}) == (
        'given: dataset.caption_variants: is 4, but with cache.text = "online" each epoch makes a new variant. Remove '
        "dataset.caption_variants."
    )
    config_from_dict({"dataset": {"shuffle_tags": True}, "cache": {"text": "online"}})


@pytest.mark.parametrize(
    ("datasets", "text"),
    [
        (
            [{"name": "cats"}, {"name": "dogs"}, {"name": "cats"}],
            'dataset 3 (cats): dataset.name: "cats" is the dataset.name of dataset 1 too',
        ),
        ([{"disabled": True}], "dataset: all are left out. Set dataset.disabled = false in one."),
        ([{"role": "eval"}], 'dataset: none is trained on. One needs dataset.role = "train".'),
        (
            [{"path": "cats", "start": "1 steps"}, {"path": "dogs", "role": "eval"}],
            'dataset: none takes part in the first step. One needs dataset.start = "0 steps".',
        ),
    ],
)
def test_datasets_that_do_not_make_a_run(datasets, text):
    assert problems({"dataset": datasets}) == f"given: {text}"


def test_addresses_that_can_never_work():
    assert problems({"dataset": [{}, {"path": "https://a/b"}], "cache": {"path": "s3://"}}).splitlines() == [
        "the settings: 2 problems:",
        "  given: dataset 2 (b): dataset.path: https://a/b: https:// cannot be read. Use a folder, s3://, gs://, "
        "abfs:// or hf://.",
        "  given: cache.path: s3://: names no bucket. Write s3://bucket/folder.",
    ]


def test_nothing_is_written_to_the_hub():
    assert problems({"cache": {"path": "hf://datasets/org/name"}}) == (
        "given: cache.path: hf:// is for reading only. Give a folder, s3://, gs:// or abfs://."
    )


@pytest.mark.parametrize("section", ["dataset", "cache"])
def test_a_key_in_an_address_is_refused_and_not_shown(section):
    text = problems({section: {"path": "s3://AKIA:s3cret@bucket/x"}})
    assert text.startswith(f"given: {section}.path: s3://***@bucket/x: holds a key, and addresses land in logs.")
    assert "s3cret" not in text
    text = problems({section: {"path": "s3://AKIA:s3cret@bucket/x "}})
    assert text == f'given: {section}.path = "s3://***@bucket/x ": has spaces at its ends'


@pytest.mark.parametrize(
    "raw",
    [
        {"lr_schedule": {"warmup": "10 steps"}, "train": {"duration": "10 steps"}},
        # not comparable before the data is known
        {"lr_schedule": {"warmup": "11 steps"}, "train": {"duration": "10 epochs"}},
        {"dataset": {"start": "0 steps", "end": "1 epoch"}},
        {"dataset": [{}, {"start": "5 steps", "end": "1 epochs"}]},
        {"dataset": [{}, {"start": "3 epochs"}]},
        {"dataset": {"captions": ["textfile", "instance_prompt"], "instance_prompt": "a cat"}},
        {"dataset": {"resolution": 1000, "bucket_step": 8}},
        {"dataset": {"resolution": 0.7, "resolution_unit": "megapixels"}},
        {"dataset": {"resolution": 0.0625, "resolution_unit": "megapixels", "bucket_step": 256}},
        {"dataset": {"resolution": 1000, "resolution_unit": "shorter_side"}},
        {"dataset": {"buckets": ["square"], "resolution": [512, 1024]}},
        {"dataset": {"buckets": ["96x192"], "bucket_step": 96}},
        {"dataset": {"buckets": ["1024x1024", "832x1216"]}},
        {"dataset": {"min_size": 512, "max_size": 0}},
        {"dataset": {"upscale": False, "max_upscale": 8.0}},
        {"dataset": {"max_upscale": 0.0}},
        {"dataset": {"max_upscale": 1.0}},
        {"dataset": {"captions": ["column"], "caption_columns": ["words"], "caption_lists": "tags"}},
        {"dataset": {"captions": ["textfile"], "caption_lines": "whole"}},
        {"dataset": {"crop": "random", "crop_variants": 2, "crop_epochs": 2}},
        {"dataset": {"tag_dropout": 0.1, "caption_variants": 2, "keep_tags": 1}},
        {"dataset": {"mask": "file", "mask_suffix": "_m.png"}},
        {"dataset": {"size_columns": []}},
        {"dataset": {"focus_columns": []}},
        {"dataset": {"path": "hf://org/name", "revision": "v2"}},
        {"dataset": [{"path": "cats"}, {"path": "cats/kittens"}, {"path": "cats"}]},
        {"dataset": [{}, {"disabled": True, "resolution": 1000}]},  # what is left out may be unfinished
        {"dataset": [{"role": "regularization"}]},
        {"eval": {"holdout": 0.0}},
        {
            "dataset": [{}, {"role": "eval"}],
            "eval": {"holdout": 0.0},
            "sweep": {"parameters": {"adapter.rank": {"grid": [4]}}},
        },
        {"cache": {"max_encoders": 4}},
        {"cache": {"num_encoders": 4}},
        {"cache": {"path": "s3://bucket/cache", "mode": "off"}},
    ],
)
def test_what_only_looks_like_a_contradiction(raw):
    assert contradictions(config_from_dict(raw)) == []


def test_a_swept_length_may_end_before_a_dataset_begins():
    raw = {
        "dataset": [{"path": "cats"}, {"path": "dogs", "start": "500 steps"}],
        "sweep": {"parameters": {"train.duration": {"grid": ["1000 steps", "400 steps"]}}},
    }
    assert problems(raw) == (
        "given: sweep.parameters.train.duration: cannot try '400 steps': dataset 2 (dogs): dataset.start: "
        '"500 steps" is not before the end of the run: train.duration = "400 steps"'
    )
