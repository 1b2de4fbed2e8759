import pytest

from sdxl_ray.config.names import fill_names, name_of


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/cats", "cats"),
        ("/data/cats/", "cats"),
        ("cats.v2", "cats.v2"),
        ("/data/cats.parquet", "cats"),
        ("/data/cats.tar.gz", "cats"),
        ("/data/cats/*.tar", "cats"),
        ("/data/cats/**/x.jpg", "cats"),
        ("/data/cats/{00000..00099}.tar", "cats"),
        ("/data/cats-{a,b}/x.tar", "data"),
        ("s3://bucket/cats", "cats"),
        ("s3://bucket/*.tar", "bucket"),
        ("s3://bucket", "bucket"),
        ("s3://bucket/cats?region=eu-central-1", "cats"),
        ("s3://bucket?region=eu-central-1/cats/*.tar", "cats"),
        ("abfs://cats@account.dfs.core.windows.net", "cats"),
        ("file:///data/cats", "cats"),
        ("hf://org/cats", "cats"),
        ("hf://datasets/org/cats@refs", "cats"),
        ("/data/me@home", "me@home"),
        ("builtin:photographs", "photographs"),
        ("a\\b", "a_b"),
        ("~", ""),
        ("/", ""),
        ("/*.tar", ""),
        ("", ""),
        ("a/" + "x" * 5000 + "[", "a"),
    ],
)
def test_the_name_of_a_path(path, name):
    assert name_of(path) == name


@pytest.mark.parametrize("path", [".", "./", "*.tar", "cats/..", "../here"])
def test_the_current_folder_has_a_name_too(tmp_path, monkeypatch, path):
    (tmp_path / "here" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert name_of(path) == "here"


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    folder = tmp_path / "[2024] cats"
    assert name_of(str(folder)) == tmp_path.name
    folder.mkdir()
    assert name_of(str(folder)) == "[2024] cats"


def test_names_are_made_to_differ():
    given = ["", "cats", "", "", "dogs", ""]
    paths = ["a/cats", "b/birds", "c/cats", "d/cats", "e", "/"]
    assert fill_names(given, paths) == ["cats-2", "cats", "cats-3", "cats-4", "dogs", "dataset"]


def test_names_that_were_given_are_left_alone():
    assert fill_names(["cats", "cats"], ["a", "b"]) == ["cats", "cats"]  # an error elsewhere
