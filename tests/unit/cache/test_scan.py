import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from sdxl_ray.cache import scan
from sdxl_ray.cache.images import decode
from sdxl_ray.cache.scan import header_hw, list_images, read_memo, scan_file, scan_images, write_memo
from sdxl_ray.errors import DatasetError, StorageError


def encoded(format="PNG", *, size=(40, 24), orientation=None, **options):
    """The bytes of a small image, `size` being (width, height) as it is stored."""
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif if format == "TIFF" else exif.tobytes()
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, format, **options)
    return buffer.getvalue()


def scan_one(path, max_pixels=10**6):
    status = path.stat()
    return scan_file((str(path), status.st_size, status.st_mtime_ns), max_pixels)


# ---- listing ---------------------------------------------------------------------------------------------------------


def test_images_are_found_below_the_folder_and_nothing_else(tmp_path):
    wanted = [
        "a.jpg",
        "B.JPEG",
        "c.PNG",
        "deep/er/d.webp",
        "e f.gif",
        "猫 😺.tiff",
        "line\nbreak.bmp",
        "g.avif",
        "h.jfif",
    ]
    unwanted = [".hidden.jpg", "._resource.jpg", ".git/a.jpg", "a.txt", "jpg", "a.jpg.txt", "movie.mp4"]
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    found = list_images(tmp_path)
    assert [path for path, _, _ in found] == sorted(str(tmp_path / name) for name in wanted)
    for path, size, mtime_ns in found:
        status = Path(path).stat()
        assert (size, mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_links_are_followed_and_loops_of_links_end(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "cat.png").write_bytes(b"cat")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "dog.png").symlink_to(tmp_path / "elsewhere" / "cat.png")
    found = [Path(path).name for path, _, _ in list_images(tmp_path / "images")]
    assert sorted(found) == ["cat.png", "dog.png"]


def test_links_that_lead_nowhere_are_listed_and_reported_with_their_reason(tmp_path):
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "itself").symlink_to("itself")  # not called like an image: not our business
    scanned = scan_images(list_images(tmp_path), memo={}, max_pixels=10**6)
    assert {Path(file.path).name: file.problem for file in scanned} == {
        "dangling.jpg": "cannot be read: No such file or directory",
        "itself.jpg": "cannot be read: Too many levels of symbolic links",
    }


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: None, "dataset.path: {} does not exist. Set it to the folder that holds your images."),
        (lambda folder: folder.write_text("x"), "dataset.path: {} is a file, expected a folder of images."),
        (lambda folder: folder.mkdir(), "dataset.path: no images in {} or its subfolders. Looked for .avif .bmp .gif"),
    ],
)
def test_a_folder_that_cannot_be_used(tmp_path, make, text):
    folder = tmp_path / "images"
    make(folder)
    with pytest.raises(DatasetError) as error:
        list_images(folder)
    assert str(error.value).startswith(text.format(folder))


def test_a_folder_that_may_not_be_entered_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    (tmp_path / "cat.png").touch()
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "secret":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DatasetError) as error:
        list_images(tmp_path)
    assert str(error.value) == (
        f"dataset.path: the folder {tmp_path / 'secret'} cannot be read: Permission denied. "
        "Allow it, or move it out of dataset.path."
    )


def test_a_name_that_is_not_utf_8_is_reported_and_does_no_harm(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(encoded())
    (scanned,) = scan_images(list_images(folder), memo={}, max_pixels=10**6)
    assert scanned.path == str(folder / r"caf\xe9.png")
    assert scanned.problem == "cannot be read: No such file or directory"
    write_memo(tmp_path / "memo.parquet", [scanned])
    assert list(read_memo(tmp_path / "memo.parquet").values()) == [scanned]


# ---- one file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
def test_the_size_is_what_a_person_sees(format, orientation):
    content = encoded(format, orientation=orientation)
    width_height = (24, 40) if orientation in (5, 6, 7, 8) else (40, 24)
    assert header_hw(content) == width_height[::-1]
    assert decode(content).size == width_height  # the same as images.py will see


def with_late_chunk(png, kind, data):
    """The PNG with a chunk after its pixels, where exiftool writes."""
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    end = png.index(b"IEND") - 4
    return png[:end] + chunk + png[end:]


def test_the_exif_of_a_png_may_follow_its_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = with_late_chunk(encoded("PNG"), b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    assert header_hw(content) == (40, 24)
    assert decode(content).size == (24, 40)


def test_the_pixels_of_a_png_are_not_decoded_by_the_scan(monkeypatch):
    content = encoded("PNG", orientation=6)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert header_hw(content) == (40, 24)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(with_late_chunk(encoded("PNG", size=(200, 100)), b"tEXt", b"Comment\0boo"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert scan_one(path, max_pixels=19_999).problem == "200x100 is more than dataset.max_pixels = 19999"


def test_as_many_pixels_as_allowed_are_allowed(tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(encoded(size=(200, 100)))
    assert scan_one(path, max_pixels=20_000).problem == ""


def test_a_good_file(tmp_path):
    path = tmp_path / "cat 😺\nline.png"
    path.write_bytes(encoded())
    file = scan_one(path)
    assert (file.height, file.width, file.problem) == (24, 40, "")
    assert file.image_hash == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file.identity == (str(path), path.stat().st_size, path.stat().st_mtime_ns)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "the file is empty"),
        (b"these are words", "not an image that Pillow can read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that Pillow can read"),
        (encoded("JPEG")[:30], "damaged header: "),
        (encoded("PNG")[:20], "damaged header: "),
        (
            encoded("AVIF").replace(b"iloc", b"xxxx"),
            "damaged header: Failed to decode image",
        ),  # a RuntimeError in Pillow
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, content, problem):
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    file = scan_one(path)
    assert file.problem.startswith(problem)
    assert (file.height, file.width, file.image_hash) == (0, 0, "")


def test_a_folder_called_like_an_image_is_looked_into(tmp_path):
    (tmp_path / "cat.jpg").mkdir()
    (tmp_path / "cat.jpg" / "dog.png").touch()
    assert [Path(path).name for path, _, _ in list_images(tmp_path)] == ["dog.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(encoded())
    path.chmod(0)
    assert scan_one(path).problem == "cannot be read: Permission denied"


def test_a_drive_that_fails(tmp_path, monkeypatch):
    def fail(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert scan_file((str(tmp_path / "cat.png"), 1, 1), 10).problem == "cannot be read: Input/output error"


# ---- progress --------------------------------------------------------------------------------------------------------


def test_the_scan_of_many_new_files_is_shown(images, monkeypatch):
    seen = []
    files = list_images(images)
    scan_images(files, memo={}, max_pixels=10**6, progress=lambda done, total: seen.append((done, total)))
    assert seen == []  # six take no time
    monkeypatch.setattr(scan, "SHOW_PROGRESS_FROM", 6)
    scan_images(files, memo={}, max_pixels=10**6, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(6, 6)]
    many = [(str(images / "0.png"), 1, time) for time in range(250)]
    scan_images(many, memo={}, max_pixels=10**6, progress=lambda done, total: seen.append((done, total)))
    assert seen[1:] == [(100, 250), (200, 250), (250, 250)]


# ---- the memo --------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(encoded(size=(10 + number, 20)))
    (folder / "bad.png").write_bytes(b"bad")
    return folder


def test_what_the_memo_knows_is_not_opened_again(images, tmp_path, monkeypatch):
    memo = tmp_path / "memo.parquet"
    first = scan_images(list_images(images), memo=read_memo(memo), max_pixels=10**6)
    write_memo(memo, first)
    monkeypatch.setattr(scan, "scan_file", lambda file, max_pixels: pytest.fail(f"opened {file}"))
    assert scan_images(list_images(images), memo=read_memo(memo), max_pixels=10**6) == first


def test_only_what_changed_is_opened_again(images, monkeypatch):
    first = scan_images(list_images(images), memo={}, max_pixels=10**6)
    os.utime(images / "2.png", ns=(1, 1))  # another time
    (images / "3.png").write_bytes(encoded(size=(99, 20)))  # another size
    (images / "new.png").write_bytes(encoded())
    opened = []
    monkeypatch.setattr(
        scan, "scan_file", lambda file, limit: opened.append(Path(file[0]).name) or scan_file(file, limit)
    )
    second = scan_images(list_images(images), memo={file.identity: file for file in first}, max_pixels=10**6)
    assert sorted(opened) == ["2.png", "3.png", "new.png"]
    assert [file.width for file in second] == [10, 11, 12, 99, 14, 0, 40]


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_a_damaged_memo_is_as_good_as_none(tmp_path, content):
    path = tmp_path / "memo.parquet"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="the images are scanned again"):
        assert read_memo(path) == {}


def test_a_memo_of_another_version_is_as_good_as_none(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"path": ["cat.png"], "colour": ["red"]}), tmp_path / "memo.parquet")
    with pytest.warns(UserWarning, match="the images are scanned again"):
        assert read_memo(tmp_path / "memo.parquet") == {}


def test_no_memo_is_an_empty_one(tmp_path):
    assert read_memo(tmp_path / "memo.parquet") == {}
    write_memo(tmp_path / "memo.parquet", [])
    assert read_memo(tmp_path / "memo.parquet") == {}


def test_a_full_disk_leaves_the_old_memo_and_no_temporary(images, tmp_path, monkeypatch):
    memo = tmp_path / "cache" / "memo.parquet"
    files = scan_images(list_images(images), memo={}, max_pixels=10**6)
    write_memo(memo, files)

    def disk_full(table, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", disk_full)
    with pytest.raises(StorageError) as error:
        write_memo(memo, files[:1])
    assert str(error.value) == (
        f"{memo}: no space left on the device while writing the list of scanned images. "
        "Free some space; nothing encoded is lost."
    )
    assert list(read_memo(memo).values()) == files
    assert list(memo.parent.iterdir()) == [memo]
