"""What the driver tells of encoding beside training. With Ray: tests/integration."""

from types import SimpleNamespace

from sdxl_ray.cache.skipped import Skipped
from sdxl_ray.train.watching import WatchedBackground


def test_damaged_images_and_captions_that_are_cut_are_told_once_each():
    lines = []
    background = SimpleNamespace(
        skipped=[Skipped("/a.png", "cannot be decoded: cut", "images")],
        num_long_captions=0,
        plan=SimpleNamespace(max_tokens=77),
    )

    watched = WatchedBackground(background, None, lambda event: lines.append(event["text"]))

    def look():
        before = len(lines)
        watched.show_notes()
        return lines[before:]

    assert look() == ["note: /a.png: cannot be decoded: cut; it does not count in training"]
    assert look() == []
    background.skipped = [Skipped("/b.png", "cannot be decoded: cut", "images"), *background.skipped]
    background.num_long_captions = 9
    assert look() == [
        "note: /b.png: cannot be decoded: cut; it does not count in training",
        "note: 9 captions are longer than 77 tokens; the rest of them is not seen (cache.caption_chunks)",
    ]
    assert look() == []
