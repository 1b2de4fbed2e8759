import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from sdxl_ray.cache import scan
from sdxl_ray.cache.formats import decode
from sdxl_ray.cache.scan import header_hw, scan_all, scan_each, scan_file, scan_images
from sdxl_ray.errors import StorageError
from sdxl_ray.records import Listed


def encoded(format="PNG", *, size=(40, 24), orientation=None, **options):
    """The bytes of a small image, `size` being (width, height) as it is stored."""
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif if format == "TIFF" else exif.tobytes()
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, format, **options)
    return buffer.getvalue()


def turned():
    """EXIF that says: by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def noise(format, size, **options):
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, os.urandom(size[0] * size[1] * 3)).save(buffer, format, **options)
    return buffer.getvalue()


def scan_one(path, max_pixels=10**6, **changes):
    return scan_file(Listed(str(path), "1-1"), max_pixels, **changes)


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
    content = with_late_chunk(encoded("PNG"), b"eXIf", turned().tobytes().removeprefix(b"Exif\0\0"))
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
    for by_listing in (False, True):
        found = scan_one(path, max_pixels=19_999, by_listing=by_listing)
        assert (found.problem, found.kind) == (
            "100x200 pixels (height x width) is more than dataset.max_pixels = 19999",
            "too_large",
        )
        assert found.image_hash == ""


def test_as_many_pixels_as_allowed_are_allowed(tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(encoded(size=(200, 100)))
    assert scan_one(path, max_pixels=20_000).problem == ""


def test_a_good_file(tmp_path):
    path = tmp_path / "cat 😺\nline.png"
    path.write_bytes(encoded())
    file = scan_one(path)
    assert (file.height, file.width, file.problem, file.kind) == (24, 40, "", "")
    assert file.image_hash == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("by_listing", [False, True])
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
def test_a_file_that_cannot_be_used_says_why(tmp_path, content, problem, by_listing):
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    file = scan_one(path, by_listing=by_listing)
    assert file.problem.startswith(problem)
    assert file.kind == "damaged"
    assert (file.height, file.width, file.image_hash) == (0, 0, "")


def test_a_file_that_is_gone_and_one_that_leads_in_circles(tmp_path):
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    gone = scan_one(tmp_path / "gone.jpg")
    assert (gone.problem, gone.kind) == ("cannot be read: No such file or directory", "unreadable")
    assert scan_one(tmp_path / "itself.jpg").problem == "cannot be read: Too many levels of symbolic links"


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "device.jpg"):
        found = scan_one(tmp_path / name)
        text = "cannot be read: it is not a regular file, but a pipe, socket or device"
        assert (found.problem, found.kind) == (text, "unreadable")


def test_a_name_that_is_not_utf_8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(encoded())
    found = scan_one(tmp_path / "caf\\xe9.png")  # as it is listed
    assert (found.problem, found.kind) == ("cannot be read: its name is not UTF-8; rename it", "unreadable")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(encoded())
    path.chmod(0)
    assert scan_one(path).problem == "cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (OSError(5, "Input/output error"), "cannot be read: Input/output error"),
        (StorageError("s3://bucket/cat.png: access denied"), "cannot be read: s3://bucket/cat.png: access denied"),
        (TimeoutError("took too long"), "cannot be read: took too long"),
    ],
)
def test_a_drive_or_store_that_fails(monkeypatch, error, problem):
    def fail(*args):
        raise error

    monkeypatch.setattr(scan, "read_bytes", fail)
    found = scan_one("cat.png")
    assert (found.problem, found.kind) == (problem, "unreadable")


def test_what_needs_a_package(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "missing_plugin_hint", lambda path, start: "HEIC needs pillow-heif")
    (tmp_path / "cat.heic").write_bytes(b"not for Pillow")
    found = scan_one(tmp_path / "cat.heic")
    assert (found.problem, found.kind) == ("HEIC needs pillow-heif", "needs_package")


def test_a_part_of_a_tar_file_is_read_and_no_more(tmp_path):
    content = encoded()
    (tmp_path / "a:b.tar").write_bytes(b"x" * 512 + content + b"y" * 99)
    address = f"tar:512+{len(content)}:{tmp_path}/a:b.tar"
    found = scan_file(Listed("0.tar/cat.png", "1", address=address), 10**6)
    assert (found.height, found.width, found.image_hash) == (24, 40, hashlib.sha256(content).hexdigest())
    cut = scan_file(Listed("0.tar/cat.png", "1", address=address.replace("tar:512", "tar:700")), 10**6)
    assert "in the middle of this image" in cut.problem
    assert cut.kind == "damaged"


# ---- identified by the listing ---------------------------------------------------------------------------------------


def test_where_the_listing_has_the_size_nothing_is_opened():
    file = Listed("/gone/cat.png", "7-7", original_hw=(30, 20))
    found = scan_file(file, 600, by_listing=True)
    assert (found.height, found.width, found.problem) == (30, 20, "")
    assert found.image_hash == hashlib.sha256(b"/gone/cat.png\x007-7").hexdigest()
    assert (
        scan_file(file, 599, by_listing=True).problem
        == "30x20 pixels (height x width) is more than dataset.max_pixels = 599"
    )


def test_a_listing_is_identified_by_address_and_stamp(tmp_path):
    path = tmp_path / "cat.png"
    path.write_bytes(encoded())

    def image_hash(**changes):
        listed = {"path": "0.tar/cat.png", "stamp": "1-1", "address": str(path), **changes}
        return scan_file(Listed(**listed), 10**6, by_listing=True).image_hash

    (tmp_path / "copy.png").write_bytes(encoded())
    hashes = [
        image_hash(),
        image_hash(path="renamed"),
        image_hash(stamp="1-2"),
        image_hash(address=f"{path.parent}/copy.png"),
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    assert hashlib.sha256(path.read_bytes()).hexdigest() not in hashes


@pytest.mark.parametrize("late", [None, b"tEXt", b"eXIf"])
def test_of_a_large_file_only_the_start_is_read(tmp_path, monkeypatch, late):
    """Whatever is behind its pixels, also where that turns it: images.py finds out."""
    path = tmp_path / "large.png"
    content = noise("PNG", (400, 300))
    notes = {b"tEXt": b"Comment\0late", b"eXIf": turned().tobytes().removeprefix(b"Exif\0\0")}
    path.write_bytes(with_late_chunk(content, late, notes[late]) if late else content)
    assert path.stat().st_size > 300_000
    assert header_hw(path.read_bytes()) == ((400, 300) if late == b"eXIf" else (300, 400))
    read = []
    monkeypatch.setattr(scan, "read_bytes", lambda address: pytest.fail("read whole"))
    real = scan.read_start
    monkeypatch.setattr(scan, "read_start", lambda address, length: read.append(length) or real(address, length))
    found = scan_one(path, by_listing=True)
    assert (found.height, found.width, found.problem) == (300, 400, "")
    assert read == [64 * 1024]


WEBPS = {
    "lossy": {},
    "lossless": {"lossless": True},
    "profile": {"icc_profile": b"p" * 100},  # VP8X without notes
    "animated": {"save_all": True, "append_images": [Image.new("RGB", (1, 1))] * 2},
}


@pytest.mark.parametrize("kind", WEBPS)
@pytest.mark.parametrize("size", [(1, 1), (300, 401), (401, 300), (16383, 3), (3, 16383)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_thirty_bytes_tell_the_size_of_a_webp(kind, size, mode):
    options = dict(WEBPS[kind])
    image = Image.new(mode, size, (9, 99, 199, 128)[: len(mode)])
    if kind == "animated":
        options["append_images"] = [image.copy(), Image.new(mode, size)]
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", method=0, **options)
    content = buffer.getvalue()
    assert content[12:16] == {"lossy": b"VP8 " if mode == "RGB" else b"VP8X", "lossless": b"VP8L"}.get(kind, b"VP8X")
    assert scan._webp_hw(content[:30], 10**6) == header_hw(content) == size[::-1]
    assert scan._webp_hw(content[:29], 10**6) is None


def test_a_webp_with_notes_is_left_to_pillow():
    """They lie behind its pixels, and may turn it."""
    assert scan._webp_hw(encoded("WEBP", orientation=6), 10**6) is None
    assert scan._webp_hw(encoded("WEBP", xmp=b"<x:xmpmeta/>"), 10**6) is None


@pytest.mark.parametrize("damage", [(0, b"RIFX"), (8, b"WAVE"), (12, b"ALPH"), (23, b"\0")])
def test_what_only_looks_like_a_webp_is_left_to_pillow(damage):
    content, (at, text) = bytearray(encoded("WEBP")), damage
    assert scan._webp_hw(bytes(content), 10**6) == (24, 40)
    content[at : at + len(text)] = text
    assert scan._webp_hw(bytes(content), 10**6) is None


def test_of_a_large_webp_only_the_start_is_read(tmp_path, monkeypatch):
    path = tmp_path / "large.webp"
    path.write_bytes(noise("WEBP", (400, 300), lossless=True))
    assert path.stat().st_size > 300_000
    read, real = [], scan.read_start
    monkeypatch.setattr(scan, "read_start", lambda address, length: read.append(length) or real(address, length))
    monkeypatch.setattr(scan, "read_bytes", lambda address: pytest.fail("read whole"))
    found = scan_one(path, by_listing=True)
    assert (found.height, found.width, found.problem) == (300, 400, "")
    assert (scan_one(path, 119_999, by_listing=True).problem, read) == (
        "300x400 pixels (height x width) is more than dataset.max_pixels = 119999",
        [64 * 1024] * 2,
    )


def test_a_header_behind_a_large_profile_is_found(tmp_path):
    """A JPEG whose first 64 KiB are EXIF and a colour profile."""
    path = tmp_path / "profile.jpg"
    path.write_bytes(encoded("JPEG", orientation=6, icc_profile=os.urandom(200_000)))
    found = scan_one(path, by_listing=True)
    assert (found.height, found.width, found.problem) == (40, 24, "")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_size_from_the_start_is_the_size_from_all(tmp_path, format, orientation):
    path = tmp_path / "cat"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if format in ("GIF", "BMP") else {"exif": exif if format == "TIFF" else exif.tobytes()}
    path.write_bytes(noise(format, (300, 200), **options))
    whole, start = scan_one(path), scan_one(path, by_listing=True)
    assert (whole.height, whole.width) == (start.height, start.width)
    assert whole.problem == start.problem == ""


# ---- many ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(encoded(size=(10 + number, 20)))
    (folder / "bad.png").write_bytes(b"bad")
    return folder


def test_files_stay_in_their_order(images):
    paths = [images / name for name in ("3.png", "bad.png", "0.png", "3.png", "gone.png")] * 20
    files = [Listed(str(path), "1-1") for path in paths]
    found = scan_images(files, max_pixels=10**6, num_threads=7)
    assert found == [scan_one(path) for path in paths]
    assert [file.width for file in found[:5]] == [13, 0, 10, 13, 0]
    assert scan_images([], max_pixels=1) == []


def test_each_file_is_identified_as_it_was_asked_for(images):
    files = [Listed(str(images / f"{number}.png"), "1-1") for number in range(4)]
    trusted = [True, False, True, False]
    found = scan_images(files, max_pixels=10**6, by_listing=trusted)
    by_content = [
        hashlib.sha256(Path(file.path).read_bytes()).hexdigest() == each.image_hash
        for file, each in zip(files, found, strict=True)
    ]
    assert by_content == [False, True, False, True]


def test_the_scan_of_many_new_files_is_shown(images):
    seen = []
    many = [Listed(str(images / "0.png"), str(number)) for number in range(299)]
    scan_images(many, max_pixels=10**6, progress=lambda done, total: seen.append((done, total)))
    assert seen == []  # they take no time
    many += [Listed(str(images / "0.png"), "300")] * 2
    scan_images(many, max_pixels=10**6, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(128, 301), (256, 301), (301, 301)]


def test_the_progress_of_one_part_goes_on_where_the_last_one_ended(images):
    seen = []
    scan = scan_all(scan_each, lambda *told: seen.append(told))
    part = [Listed(str(images / "0.png"), str(number)) for number in range(301)]
    for _ in range(2):
        assert len(list(scan(part, max_pixels=10**6, by_listing=[False] * 301))) == 301
    ends = [(128, 301), (256, 301), (301, 301), (429, 602), (557, 602), (602, 602)]
    assert seen == [("scan", *end) for end in ends]


def test_the_scale_in_a_webps_header_is_no_part_of_its_size(tmp_path):
    """Two bits of each number, a hint for viewers (RFC 6386, 9.1)."""
    path = tmp_path / "cat.webp"
    Image.new("RGB", (40, 30)).save(path, quality=50)
    content = bytearray(path.read_bytes())
    assert content[12:16] == b"VP8 "
    content[27] |= 0x40
    content[29] |= 0x80
    path.write_bytes(content)
    found = scan_file(Listed(str(path), "1"), 10**6, by_listing=True)
    assert (found.height, found.width, found.problem) == (30, 40, "")
