"""Make the demo photographs from the sample pictures that scikit-image ships.

    pip install scikit-image==0.26.0 && python scripts/make_photographs.py [FOLDER]

FOLDER defaults to sdxl_ray/demo/photographs. The pictures, their captions and
SOURCES.md all come from the tables below, so edit those and run this again. One
package is the only source, and nothing is downloaded: every picture used here lies in
the scikit-image wheel. Runs with the same versions of scikit-image and Pillow give the
same bytes; another Pillow may bring another JPEG encoder.
"""

import argparse
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import skimage.data
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "sdxl_ray" / "demo" / "photographs"
JPEG_QUALITY = 88
ORIENTATION = 0x0112  # the EXIF tag
# What to do to an upright picture so that a viewer which obeys the tag shows it upright.
UNDO_ORIENTATION = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the source
Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Source:
    """A sample picture, with what the docstring of its function says of it."""

    author: str
    licence: str


@dataclass(frozen=True)
class Photograph:
    """A file to make; size None keeps the pixels of the crop as they are."""

    name: str
    source: str  # a key of SOURCES
    box: Box
    size: Size | None
    captions: tuple[str, ...]  # alternatives, one a line
    orientation: int = 1
    cut_out: bool = False


# Only pictures that the package states to be CC0 or public domain: not moon() or
# stereo_motorcycle() (no licence stated), nor coins() or immunohistochemistry() ("no
# known copyright restrictions", without a dedication).
SOURCES: dict[str, Source] = {
    "astronaut": Source(
        "NASA Great Images database, <https://flic.kr/p/r9qvLn>",
        "No known copyright restrictions, released into the public domain",
    ),
    "brick": Source(
        "CC0Textures, <https://cc0textures.com/view.php?tex=Bricks25>",
        "Creative Commons CC0",
    ),
    "camera": Source("Lav Varshney", "No copyright restrictions, CC0 by the photographer"),
    "chelsea": Source("Stefan van der Walt", "No copyright restrictions, CC0 by the photographer"),
    "clock": Source("Stefan van der Walt", "Released into the public domain by the photographer"),
    "coffee": Source(
        "Rachel Michetti, courtesy of Pikolo Espresso Bar",
        "No copyright restrictions, CC0 by the photographer",
    ),
    "grass": Source(
        "DeviantArt, <https://www.deviantart.com/linolafett/art/Grass-01-434853879>",
        "Creative Commons CC0",
    ),
    "gravel": Source(
        "CC0Textures, <https://cc0textures.com/view.php?tex=Gravel04>",
        "Creative Commons CC0",
    ),
    "hubble_deep_field": Source(
        "NASA, HubbleSite, <http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/>",
        "May be freely used in the public domain",
    ),
    "retina": Source(
        "Mikael Häggström, <https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg>",
        "Creative Commons CC0 1.0 Universal Public Domain Dedication",
    ),
    "rocket": Source(
        "SpaceX Photos, <https://www.flickr.com/photos/spacexphotos/16511594820/in/photostream/>",
        "Released in the public domain",
    ),
}

PHOTOGRAPHS: tuple[Photograph, ...] = (
    Photograph(
        "astronaut.jpg",
        "astronaut",
        (0, 0, 512, 512),
        None,
        (
            "A smiling astronaut in an orange space suit beside a flag, a helmet and a model of a space shuttle.",
            "Portrait of a woman in an orange space suit.",
        ),
    ),
    Photograph(
        "astronaut_tall.jpg",
        "astronaut",
        (70, 0, 390, 480),
        None,
        ("Portrait of a woman with short hair wearing an orange space suit and smiling.",),
    ),
    Photograph(
        "bricks.jpg",
        "brick",
        (0, 0, 512, 288),
        None,
        ("Rows of dark bricks with pale mortar running into the distance, in black and white.",),
    ),
    Photograph(
        "cat_face.jpg",
        "chelsea",
        (95, 0, 395, 300),
        None,
        ("Close-up of the face of a tabby cat with green eyes and a reddish nose.",),
    ),
    Photograph(
        "cat_portrait.jpg",
        "chelsea",
        (0, 0, 450, 300),
        None,
        (
            "A tabby cat with green eyes looking down to the side.",
            "Close-up photograph of a tabby cat with long white whiskers.",
            "A striped cat in front of a blurred background.",
        ),
    ),
    Photograph(
        "clock_blurred.jpg",
        "clock",
        (0, 0, 400, 300),
        None,
        ("A round clock on a plain grey wall, blurred by sideways motion.",),
    ),
    Photograph(
        "coffee_cup.jpg",
        "coffee",
        (0, 0, 600, 400),
        None,
        (
            "A cup of espresso on a red saucer with a spoon, on a wooden table.",
            "Espresso in a red cup with a white inside, seen from above.",
        ),
    ),
    Photograph(
        "coffee_tall.jpg",
        "coffee",
        (160, 0, 460, 400),
        None,
        ("A red espresso cup and a small metal spoon on a red saucer.",),
        orientation=8,
    ),
    Photograph(
        "deep_field.jpg",
        "hubble_deep_field",
        (0, 0, 1000, 750),
        (800, 600),
        ("Countless small galaxies of many colours scattered over a black sky.",),
    ),
    Photograph(
        "deep_field_wide.jpg",
        "hubble_deep_field",
        (0, 440, 1000, 868),
        (840, 360),
        ("A wide view of distant galaxies, orange, white and blue, against black space.",),
    ),
    Photograph(
        "galaxies.png",
        "hubble_deep_field",
        (600, 380, 920, 700),
        None,
        ("A bright orange galaxy and a star with rays among many small galaxies.",),
    ),
    Photograph(
        "grass.jpg",
        "grass",
        (0, 0, 340, 510),
        None,
        ("Grass and clover leaves seen from above, in black and white.",),
    ),
    Photograph(
        "gravel.jpg",
        "gravel",
        (0, 0, 512, 384),
        None,
        ("Sharp-edged gravel stones filling the whole picture, in black and white.",),
    ),
    Photograph(
        "photographer.png",
        "camera",
        (0, 0, 512, 512),
        None,
        ("A man in a dark coat looking through a camera on a tripod, on a wide lawn.",),
    ),
    Photograph(
        "photographer_near.jpg",
        "camera",
        (100, 50, 400, 275),
        (400, 300),
        ("Side view of a man in a dark coat bending to a camera, in black and white.",),
    ),
    Photograph(
        "photographer_tall.jpg",
        "camera",
        (180, 52, 410, 512),
        None,
        ("A man at the left edge looking into a camera on a tall tripod, in black and white.",),
    ),
    Photograph(
        "retina.png",
        "retina",
        (0, 0, 1411, 1411),
        (480, 480),
        ("Medical photograph of a retina: an orange disc with branching blood vessels.",),
        cut_out=True,
    ),
    Photograph(
        "rocket_tall.jpg",
        "rocket",
        (219, 62, 423, 427),
        (360, 644),
        ("A tall white rocket on its pad under a dark blue sky, a bright lamp beside it.",),
        orientation=6,
    ),
    Photograph(
        "rocket_wide.jpg",
        "rocket",
        (0, 67, 640, 427),
        None,
        ("A white rocket on its launch pad between steel towers under a dark blue sky.",),
    ),
    Photograph(
        "shuttle_model.jpg",
        "astronaut",
        (362, 0, 512, 300),
        (300, 600),
        ("A model of a space shuttle with its brown fuel tank and white boosters.",),
    ),
    Photograph(
        "space_helmet.jpg",
        "astronaut",
        (256, 320, 512, 512),
        (400, 300),
        ("A white space helmet with a dark, shiny visor in front of an orange suit.",),
    ),
)


def cut_out_disc(picture: Image.Image) -> Image.Image:
    """Make the black surround transparent, which is outside the camera's round field."""
    # All of the retina is strongly red, so its red channel alone tells it from black.
    alpha = picture.getchannel("R").point([0] * 64 + [255] * 192)
    picture.putalpha(alpha)
    return picture


def make_image(photograph: Photograph) -> Image.Image:
    """The upright picture."""
    array = getattr(skimage.data, photograph.source)()
    picture = Image.fromarray(array).crop(photograph.box)
    if photograph.cut_out:
        # Before resizing, so that the edge of the disc becomes smooth.
        picture = cut_out_disc(picture)
    if photograph.size is not None:
        picture = picture.resize(photograph.size, Image.Resampling.LANCZOS)
    return picture


def save(picture: Image.Image, path: Path, orientation: int) -> None:
    """Write a PNG, or a JPEG that is stored turned when it carries an orientation."""
    if path.suffix == ".png":
        picture.save(path, optimize=True)
    elif orientation == 1:
        picture.save(path, quality=JPEG_QUALITY, optimize=True)
    else:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        stored = picture.transpose(UNDO_ORIENTATION[orientation])
        stored.save(path, quality=JPEG_QUALITY, optimize=True, exif=exif)


def what_was_done(photograph: Photograph, picture: Image.Image) -> str:
    """The last column of SOURCES.md."""
    steps = [f"crop {photograph.box}"]
    if photograph.cut_out:
        steps.append("black surround made transparent")
    if photograph.size is not None:
        steps.append("resized")
    steps.append(f"{picture.width}×{picture.height}")
    if photograph.orientation != 1:
        steps.append(f"stored rotated, EXIF orientation {photograph.orientation}")
    return ", ".join(steps)


def sources_table(rows: list[str]) -> str:
    """The text of SOURCES.md."""
    return "\n".join(
        [
            "# Sources of the photographs",
            "",
            "Written by `scripts/make_photographs.py`, as are the pictures and captions.",
            f"All originals are sample pictures in scikit-image {version('scikit-image')}",
            "(`skimage.data`). Author and licence are as the docstring of each function",
            "states them. Several files are crops of one photograph. Crop boxes are (left,",
            "top, right, bottom) in pixels of the original; sizes are width×height as",
            "shown, that is with EXIF orientation applied. Resizing is by Lanczos.",
            "",
            "`brick`, `grass` and `gravel` were turned grey and cropped or scaled by",
            "scikit-image from texture photographs, `brick` also warped and rotated.",
            "",
            "| File | Original | Author or source | Licence as stated | What was done |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Write every picture, its captions and SOURCES.md."""
    parser = argparse.ArgumentParser(description="Make the demo photographs.")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[str] = []
    for photograph in PHOTOGRAPHS:
        path = folder / photograph.name
        picture = make_image(photograph)
        save(picture, path, photograph.orientation)
        captions = "".join(f"{caption}\n" for caption in photograph.captions)
        path.with_suffix(".txt").write_text(captions, encoding="utf-8", newline="\n")
        source = SOURCES[photograph.source]
        rows.append(
            f"| `{photograph.name}` | `{photograph.source}()` | {source.author} "
            f"| {source.licence} | {what_was_done(photograph, picture)} |"
        )
    table = sources_table(rows)
    (folder / "SOURCES.md").write_text(table, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
