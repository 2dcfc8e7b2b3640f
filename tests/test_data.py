import contextlib
import csv
import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from attr_batch import data as data_module
from attr_batch.coalition import Coalition
from attr_batch.data import Data, Digits, ImageFolder, arrange, natural
from attr_batch.errors import DataError


def picture(seed: int, size: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (channels, size, size), np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).save(path, **options)


def write_csv(folder: Path, header: list[str], rows: list[list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def folder_of(root: Path, rows: list[tuple[str, str, str, int]], size: int = 8) -> ImageFolder:
    """Write a folder of (file name, artist, style, seed of the picture)."""
    for name, _, _, seed in rows:
        save(root / name, picture(seed, size))
    write_csv(root, ["file_name", "artist", "style"], [list(row[:3]) for row in rows])
    return part(root)


def part(root: Path, **changes) -> ImageFolder:
    fields = {"path": str(root), "contributor": "artist", "label": "style", "size": 8, **changes}
    return ImageFolder(kind="image_folder", **fields)


ROWS = [
    ("a/1.png", "2", "ink", 1),
    ("a/2.png", "10", "oil", 2),
    ("3.png", "2", "oil", 3),
    ("4.png", "Ann", "ink", 4),
    ("5.png", "2", "ink", 5),
    ("6.png", "10", "ink", 6),
]


def test_digits_are_the_contributors_and_the_labels():
    digits = Digits().load()
    assert digits.images.shape == (1797, *Digits().shape)
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    assert digits.roster.ids == digits.label_names == tuple("0123456789")
    assert [c.images for c in digits.roster.contributors] == np.bincount(digits.labels).tolist()
    assert (digits.contributor == digits.labels).all()


def test_a_restricted_roster_is_that_coalition():
    few = Digits(contributors=("7", "1")).load()
    of_all = Digits().load().subset(Coalition.of([1, 7], 10))
    assert few.roster == of_all.roster
    assert few.images.tobytes() == of_all.images.tobytes()
    with pytest.raises(
        DataError, match=r"data.contributors: contributor 'x'.*\n  hint: there are: 0"
    ):
        Digits(contributors=("x", "1")).load()


def test_pixels_of_a_png_of_the_right_size_are_kept(tmp_path):
    loaded = folder_of(tmp_path, ROWS).load()
    assert loaded.roster.ids == ("2", "10", "Ann")
    assert loaded.label_names == ("ink", "oil")
    assert loaded.contributor.tolist() == [0, 0, 0, 1, 1, 2]
    wanted = {picture(seed).tobytes(): (who, style) for _, who, style, seed in ROWS}
    got = {
        image.tobytes(): (loaded.roster.ids[c], loaded.label_names[y])
        for image, c, y in zip(loaded.images, loaded.contributor, loaded.labels, strict=True)
    }
    assert got == wanted


def test_file_names_and_row_order_leave_no_trace(tmp_path):
    one = folder_of(tmp_path / "one", ROWS).load()
    renamed = [(f"{9 - i}.png", *row[1:]) for i, row in enumerate(ROWS)]
    two = folder_of(tmp_path / "two", renamed[::-1]).load()
    assert one.roster == two.roster
    assert one.digest == two.digest
    assert one.images.tobytes() == two.images.tobytes()
    assert one.labels.tolist() == two.labels.tolist()


@pytest.mark.parametrize(
    ("changed", "touches"),
    [
        (("a/1.png", "2", "ink", 99), {"2"}),  # another picture
        (("a/1.png", "2", "oil", 1), {"2"}),  # another label
        (("a/1.png", "Ann", "ink", 1), {"2", "Ann"}),  # another contributor
        (("b/x.png", "2", "ink", 1), set()),  # another file name
    ],
)
def test_a_contributors_digest_changes_with_its_images_and_labels_alone(tmp_path, changed, touches):
    one = folder_of(tmp_path / "one", ROWS).load()
    two = folder_of(tmp_path / "two", [changed, *ROWS[1:]]).load()
    before = {c.id: c.digest for c in one.roster.contributors}
    after = {c.id: c.digest for c in two.roster.contributors}
    assert {name for name in before if before[name] != after[name]} == touches
    assert (one.digest == two.digest) == (not touches)


def test_no_labels_no_label_names(tmp_path):
    folder_of(tmp_path, ROWS)
    loaded = part(tmp_path, label=None).load()
    assert (loaded.labels, loaded.label_names) == (None, ())
    assert loaded.digest != part(tmp_path).load().digest


def test_jsonl_with_numbers_says_the_same_as_csv(tmp_path):
    as_csv = folder_of(tmp_path / "csv", ROWS).load()
    folder_of(tmp_path / "jsonl", ROWS)
    (tmp_path / "jsonl/metadata.csv").unlink()
    lines = [
        json.dumps({"file_name": n, "artist": int(a) if a.isdigit() else a, "style": s, "x": [1]})
        for n, a, s, _ in ROWS
    ]
    (tmp_path / "jsonl/metadata.jsonl").write_text("\n\n".join(lines))
    assert part(tmp_path / "jsonl").load().digest == as_csv.digest


def test_ids_are_composed_and_stripped(tmp_path):
    rows = [("1.png", "Zoe\u0308", "ink", 1), ("2.png", " Zo\u00eb ", "ink", 2), ROWS[3]]
    assert folder_of(tmp_path, rows).load().roster.ids == ("Ann", "Zo\u00eb")


@given(st.data())
def test_subset_depends_on_the_members_only(draw):
    n = draw.draw(st.integers(2, 5))
    count = draw.draw(st.integers(n, 12))
    owners = [str(i % n) for i in range(count)]
    images = np.stack([picture(i, 2, 1) for i in range(count)])
    members = draw.draw(st.sets(st.integers(0, n - 1)))
    everyone = arrange(images, owners, owners)
    chosen = [i for i in range(count) if int(owners[i]) in members]
    draw.draw(st.randoms()).shuffle(chosen)
    got = everyone.subset(Coalition.of(members, n))
    alone = arrange(images[chosen], [owners[i] for i in chosen], [owners[i] for i in chosen])
    assert got.images.tobytes() == alone.images.tobytes()
    assert got.contributor.tolist() == alone.contributor.tolist()
    assert got.roster == alone.roster
    assert [got.label_names[i] for i in got.labels] == [alone.label_names[i] for i in alone.labels]


def test_images_are_not_searched_anew_for_every_contributor():
    class Counted(list):
        asked = 0

        def __getitem__(self, i):
            self.asked += 1
            return super().__getitem__(i)

    images = np.arange(300, dtype=np.uint16).view(np.uint8).reshape(300, 1, 1, 2)
    owners = Counted([str(i % 100) for i in range(300)])
    assert len(arrange(images, owners, None).roster) == 100
    assert owners.asked <= 3 * len(images)


def test_subset_of_another_roster_is_refused():
    with pytest.raises(ValueError, match="coalition of 3, but 10"):
        Digits().load().subset(Coalition.grand(3))


@given(st.lists(st.integers(0, 10**30)))
def test_natural_order_is_that_of_numbers(numbers):
    assert sorted(map(str, numbers), key=natural) == [str(i) for i in sorted(numbers)]
    assert sorted([f"a{i}b" for i in numbers], key=natural) == [f"a{i}b" for i in sorted(numbers)]


# -- decoding -------------------------------------------------------------------------------------


def decoded(tmp_path: Path, image: Image.Image, name: str = "x.png", channels: int = 3, **options):
    """Return what the loader makes of one image."""
    folder_of(tmp_path, ROWS[:2])
    image.save(tmp_path / name, **options)
    rows = [[name, "x", "ink"], *(list(row[:3]) for row in ROWS[:2])]
    write_csv(tmp_path, ["file_name", "artist", "style"], rows)
    loaded = part(tmp_path, channels=channels).load()
    return loaded.images[loaded.contributor == loaded.roster.ids.index("x")][0]


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 8, 4))
    got = decoded(tmp_path, image)
    assert got[:, :4].reshape(3, -1).T.tolist() == [[255, 0, 0]] * 32
    assert got[:, 4:].min() == 255


def test_a_transparent_palette_is_laid_on_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.paste(0, (0, 0, 8, 4))
    got = decoded(tmp_path, image, transparency=0)
    assert got[:, :4].min() == 255
    assert got[:, 5, 5].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_png_gives_the_same_grey(tmp_path, mode, channels):
    image = Image.new("L", (8, 8), 255).convert(mode)
    assert decoded(tmp_path, image, channels=channels).tolist() == [[[255] * 8] * 8] * channels


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    high = Image.fromarray(np.full((8, 8), 0x8080, np.uint16))
    assert (decoded(tmp_path, high) == 0x80).all()


def test_cmyk_jpeg_and_webp_are_read(tmp_path):
    grey = Image.new("RGB", (8, 8), (90, 90, 90))
    assert abs(decoded(tmp_path, grey.convert("CMYK"), "x.jpg").astype(int) - 90).max() <= 2
    assert abs(decoded(tmp_path, grey, "x.webp", lossless=True).astype(int) - 90).max() == 0


def test_exif_orientation_is_applied(tmp_path):
    upright = picture(7)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    stored = Image.fromarray(np.rot90(upright.transpose(1, 2, 0)).copy())
    assert (decoded(tmp_path, stored, exif=exif) == upright).all()


def test_the_centred_square_is_kept(tmp_path):
    wide = np.zeros((3, 8, 24), np.uint8)
    wide[:, :, 8:16] = picture(3)
    assert (decoded(tmp_path, Image.fromarray(wide.transpose(1, 2, 0))) == picture(3)).all()


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_scaling_down_does_not_alias(tmp_path, name):
    stripes = np.zeros((640, 640), np.uint8)
    stripes[:, ::2] = (
        255  # the finest there are; a filter without antialiasing keeps one or the other
    )
    got = decoded(tmp_path, Image.fromarray(stripes), name).astype(int)
    assert abs(got - 127.5).max() <= 6


def test_small_images_are_enlarged_with_a_warning(tmp_path, capsys):
    decoded(tmp_path, Image.new("RGB", (4, 4), "red"))
    assert "1 of 3 images are smaller than 8 pixels" in capsys.readouterr().err


def test_unlisted_images_are_named_in_a_warning(tmp_path, capsys):
    folder = folder_of(tmp_path, ROWS)
    save(tmp_path / "z/extra.JPG", picture(1))
    assert len(folder.load()) == len(ROWS)
    assert "1 images are not listed and not used (z/extra.JPG)" in capsys.readouterr().err


# -- the fingerprint ------------------------------------------------------------------------------


def test_fingerprint_moves_with_files_metadata_and_options(tmp_path):
    folder = folder_of(tmp_path, ROWS)
    seen = [folder.fingerprint()]
    assert folder.fingerprint() == seen[0]
    os.utime(tmp_path / "3.png", ns=(1, 1))
    seen.append(folder.fingerprint())
    (tmp_path / "3.png").unlink()
    seen.append(folder.fingerprint())
    write_csv(tmp_path, ["file_name", "artist", "style"], [list(row[:3]) for row in ROWS[1:]])
    seen.append(folder.fingerprint())
    seen.append(part(tmp_path, size=16).fingerprint())
    save(tmp_path / "unlisted.png", picture(1))
    assert part(tmp_path, size=16).fingerprint() == seen[-1]
    assert len(set(seen)) == len(seen)
    assert Digits().fingerprint() != Digits(contributors=("0", "1")).fingerprint()


def test_an_edit_that_keeps_name_size_and_mtime_moves_the_fingerprint(tmp_path):
    folder = folder_of(tmp_path, ROWS)
    path = (tmp_path / "3.png").rename(tmp_path / "3.jfif")  # what load() reads, whatever its name
    rows = [list(row[:3]) for row in ROWS]
    write_csv(tmp_path, ["file_name", "artist", "style"], [["3.jfif", *rows[2][1:]], *rows[3:]])
    before, times, content = folder.fingerprint(), path.stat(), path.read_bytes()
    path.write_bytes(content[::-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert folder.fingerprint() != before


@pytest.mark.parametrize("name", ["gone.png", "x" * 5000, "a\0b", ""])
def test_the_fingerprint_leaves_it_to_load_to_complain(tmp_path, name):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "artist": "x"}))
    assert part(tmp_path).fingerprint()
    with pytest.raises(DataError):
        part(tmp_path).load()


def test_neither_path_nor_torch_is_in_it(tmp_path):
    assert str(tmp_path) not in json.dumps(part(tmp_path).recipe())
    code = "import sys, attr_batch.data as d; d.Digits().load(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- bad data -------------------------------------------------------------------------------------


def rewrite(text: str):
    return lambda root: (root / "metadata.csv").write_text(text)


def _animation(root: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(root / "3.png", save_all=True, append_images=frames[1:])


def _bomb(root: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    tail = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (root / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + tail)


def _large(root: Path) -> None:
    save(root / "3.png", np.zeros((1, 8000, 10_001), np.uint8))


def _link(root: Path) -> None:
    outside = root.parent / "outside.png"
    save(outside, picture(1))
    (root / "3.png").unlink()
    (root / "3.png").symlink_to(outside)


def _both(root: Path) -> None:
    (root / "metadata.jsonl").write_text("{}")


def _truncated(root: Path) -> None:
    path = root / "3.png"
    path.write_bytes(path.read_bytes()[:-30])


def _jsonl(text: str):
    def damage(root: Path) -> None:
        (root / "metadata.csv").unlink()
        (root / "metadata.jsonl").write_text(text)

    return damage


HEAD = "file_name,artist,style\n"
GOOD = "a/1.png,2,ink\na/2.png,10,oil\n"
GOOD_JSON = '{"file_name": "3.png", "artist": "x", "style": "y"}\n'

BAD = {
    "no metadata": (
        lambda root: (root / "metadata.csv").unlink(),
        "",
        "no metadata.csv",
        "one row",
    ),
    "both": (_both, "", "both metadata.csv and metadata.jsonl", "remove one"),
    "no column": (rewrite("file_name,painter,style\n" + GOOD), "", "no column 'artist'", "painter"),
    "two columns": (
        rewrite("file_name,artist,style,style\n"),
        ":1",
        "'style' stands twice",
        "remove",
    ),
    "no rows": (rewrite(HEAD), "", "lists no images", "add a row"),
    "empty file": (rewrite(""), "", "lists no images", "add a row"),
    "missing file": (rewrite(HEAD + GOOD + "gone.png,2,ink\n"), ":4", "file is missing", "not in"),
    "a folder": (rewrite(HEAD + GOOD + "a,2,ink\n"), ":4", "file is missing", "it is a folder"),
    "no contributor": (rewrite(HEAD + GOOD + "3.png, ,ink\n"), ":4", "artist is empty", "every"),
    "no label": (rewrite(HEAD + GOOD + "3.png,2,\n"), ":4", "style is empty", "every image"),
    "no file name": (rewrite(HEAD + GOOD + ",2,ink\n"), ":4", "file_name is empty", "every image"),
    "short row": (rewrite(HEAD + GOOD + "3.png,2\n"), ":4", "has 2 cells, wanted 3", "comma"),
    "long row": (rewrite(HEAD + GOOD + "3.png,2,b,c\n"), ":4", "has 4 cells", "comma"),
    "open quote": (
        rewrite(HEAD + GOOD + '"3.png,2,ink\n'),
        ":4",
        "not valid CSV",
        "does not close",
    ),
    "absolute": (rewrite(HEAD + GOOD + "/etc/x.png,2,ink\n"), ":4", "leads out of the", "relative"),
    "dot dot": (rewrite(HEAD + GOOD + "a/../3.png,2,ink\n"), ":4", "leads out of the", "relative"),
    "backslash": (rewrite(HEAD + GOOD + "a\\1.png,2,ink\n"), ":4", "bad file name", "forward"),
    "long name": (
        rewrite(HEAD + GOOD + "x" * 5000 + ",2,ink\n"),
        ":4",
        "cannot be read",
        "stay in",
    ),
    "link out": (_link, ":4", "link that leads out", "stay inside"),
    "twice": (rewrite(HEAD + GOOD + "./a//1.png,10,ink\n"), ":4", "listed twice", "is line 2"),
    "one only": (rewrite(HEAD + "3.png,2,ink\n"), "", "only one contributor ('2')", "right column"),
    "latin-1": (
        lambda root: (root / "metadata.csv").write_bytes(HEAD.encode() + b"3.png,Zo\xeb,ink\n"),
        "",
        "not UTF-8 (byte 31)",
        "save it as UTF-8",
    ),
    "not an image": (
        lambda root: (root / "3.png").write_text("hello"),
        ":4: 3.png",
        "not a readable image",
        "PNG, JPEG or WebP",
    ),
    "empty image": (
        lambda root: (root / "3.png").write_bytes(b""),
        ":4: 3.png",
        "not a readable image",
        "completely copied",
    ),
    "another format": (
        lambda root: Image.new("L", (8, 8)).save(root / "3.png", format="BMP"),
        ":4: 3.png",
        "not a readable image",
        "PNG, JPEG or WebP",
    ),
    "truncated": (_truncated, ":4: 3.png", "not a readable image", "completely copied"),
    "animation": (_animation, ":4: 3.png", "an animation of 2 frames", "a still image"),
    "bomb": (_bomb, ":4: 3.png", "more than 80 megapixels", "scale it down"),
    "huge": (_large, ":4: 3.png", "more than 80 megapixels", "scale it down"),
    "bad JSON": (_jsonl(GOOD_JSON + "{'a'}\n"), ":2", "not valid JSON", "one JSON object a line"),
    "no object": (_jsonl(GOOD_JSON + "[1]\n"), ":2", "not a JSON object", "one JSON object"),
    "deep JSON": (_jsonl(GOOD_JSON + "[" * 100_000), ":2", "not valid JSON", "one JSON object"),
    "not text": (
        _jsonl(GOOD_JSON + '{"file_name": "4.png", "artist": {"n": 1}, "style": "y"}\n'),
        ":2",
        'artist is {"n": 1}',
        "put it in quotes",
    ),
    "surrogate in an id": (
        _jsonl(GOOD_JSON + r'{"file_name": "4.png", "artist": "\ud800", "style": "y"}' + "\n"),
        ":2",
        r"artist is '\ud800', which is not Unicode",
        "surrogate",
    ),
    "surrogate in a label": (
        _jsonl(GOOD_JSON + r'{"file_name": "4.png", "artist": "x", "style": "a\udfff"}' + "\n"),
        ":2",
        r"style is 'a\udfff', which is not Unicode",
        "surrogate",
    ),
    "surrogate in a file name": (
        _jsonl(GOOD_JSON + r'{"file_name": "\udc80.png", "artist": "x", "style": "y"}' + "\n"),
        ":2",
        r"file_name is '\udc80.png', which is not Unicode",
        "surrogate",
    ),
    "null": (
        _jsonl(GOOD_JSON + '{"file_name": "4.png", "artist": null, "style": "y"}\n'),
        ":2",
        "artist is empty",
        "every image",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_explained_with_place_and_hint(tmp_path, case):
    root = tmp_path / "pictures"
    folder = folder_of(root, ROWS)
    damage, place, what, hint = BAD[case]
    damage(root)
    with pytest.raises(DataError) as caught:
        folder.load()
    assert caught.value.exit_code == 65
    assert all(p.where and str(root) in p.where and p.hint for p in caught.value.problems)
    [problem] = [p for p in caught.value.problems if what in p.what]
    assert place in problem.where.removeprefix(str(root))
    assert hint in problem.hint


def test_a_missing_folder_and_one_with_splits(tmp_path):
    with pytest.raises(DataError, match="no such folder\n  hint: it is taken relative to the YAML"):
        part(tmp_path / "gone").load()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="not a folder"):
        part(tmp_path / "file").fingerprint()
    folder_of(tmp_path / "train", ROWS)
    with pytest.raises(DataError, match=r"one in train/: set data\.path to it"):
        part(tmp_path).load()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_path_that_cannot_be_a_folder_is_a_data_error(name):
    folder = ImageFolder(kind="image_folder", path=name, contributor="artist", size=8)
    for use in (folder.fingerprint, folder.load):
        with pytest.raises(DataError, match=r"^data\.path") as caught:
            use()
        assert caught.value.problems[0].hint


def test_all_problems_come_at_once(tmp_path):
    folder_of(tmp_path, ROWS)
    (tmp_path / "3.png").write_text("no image")
    (tmp_path / "4.png").unlink()
    rows = [list(row[:3]) for row in ROWS] + [["5.png", "10", "oil"], ["../6.png", "", "oil"]]
    write_csv(tmp_path, ["file_name", "artist", "style"], rows)
    with pytest.raises(DataError) as caught:
        part(tmp_path, contributors=("2", "10", "An")).load()
    found = sorted(p.where.removeprefix(f"{tmp_path}/metadata.csv") for p in caught.value.problems)
    assert found == [":4: 3.png", ":5: 4.png", ":8", ":9", ":9", "data.contributors"]


def test_ten_thousand_problems_are_summed_up(tmp_path):
    write_csv(
        tmp_path, ["file_name", "artist", "style"], [[f"{i}.png", "a", "b"] for i in range(300)]
    )
    with pytest.raises(DataError) as caught:
        part(tmp_path).load()
    assert len(caught.value.problems) == data_module.MAX_PROBLEMS + 1
    assert caught.value.problems[-1].what == "and 200 more problems like these"


def test_unknown_contributor_is_named_with_the_nearest(tmp_path):
    folder_of(tmp_path, ROWS)
    with pytest.raises(
        DataError, match=r"contributor 'Anne' has no images\n  hint: did you mean 'Ann'"
    ):
        part(tmp_path, contributors=("Anne", "2")).load()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_never_end_in_another_error(tmp_path, kind):
    folder = folder_of(tmp_path, ROWS)
    whole = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(picture(1, 32).transpose(1, 2, 0)).save(whole, kind, exif=exif)
    dice = random.Random(0)
    for _ in range(60):
        bytes_ = bytearray(whole.getvalue())
        for _ in range(dice.randint(1, 8)):
            bytes_[dice.randrange(min(len(bytes_), 400))] = dice.randrange(256)
        (tmp_path / "3.png").write_bytes(bytes_[: dice.randint(len(bytes_) // 2, len(bytes_))])
        with contextlib.suppress(DataError):
            folder.load()


@pytest.mark.parametrize(
    "given",
    [
        '{"kind": "digits", "contributors": ["1"]}',
        '{"kind": "digits", "contributors": ["1", 1]}',
        '{"kind": "digits", "contributors": [true, "1"]}',
        '{"kind": "digits", "size": 8}',
        '{"kind": "image_folder", "path": "x", "contributor": "a", "size": 4}',
        '{"kind": "image_folder", "path": "x", "contributor": "a", "size": 8, "channels": 4}',
    ],
)
def test_bad_parts_are_refused(given):
    with pytest.raises(ValidationError):
        TypeAdapter(Data).validate_json(given, strict=True)


def test_numbers_are_names():
    part = TypeAdapter(Data).validate_json(
        '{"kind": "digits", "contributors": [1, "7"]}', strict=True
    )
    assert part.contributors == ("1", "7")
