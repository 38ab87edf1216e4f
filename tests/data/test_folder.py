"""A folder of images with captions: pairs, order, pixels, and messages for invalid files."""

import errno
import json
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from scfm_core.data import folder as folder_module
from scfm_core.data.folder import ImageFolder
from scfm_core.data.image import (
    ANIMATED,
    CROPPED,
    ENLARGED,
    TRANSPARENT,
    image_size,
    load_picture,
    picture_notes,
    unit_range,
)
from scfm_core.data.schema import BadData
from scfm_core.errors import UserError


def write_image(path: Path, pixels: torch.Tensor | None = None, **save_options: object) -> Path:
    """`pixels` is uint8 [H, W] or [H, W, 3 or 4]; the default is a small dark image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.full((8, 8, 3), 10, dtype=torch.uint8) if pixels is None else pixels
    Image.fromarray(pixels.numpy()).save(path, **save_options)
    return path


def write_pair(folder: Path, name: str, caption: str) -> None:
    path = write_image(folder / name)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def write_metadata(folder: Path, rows: list[dict[str, str]], **options: bool) -> None:
    lines = [json.dumps(row, **options) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def contents(folder: Path) -> list[tuple[str, str]]:
    dataset = ImageFolder(folder)
    records = [dataset.load(index, (8, 8)) for index in range(len(dataset))]
    assert [dataset.caption(index) for index in range(len(dataset))] == [record.caption for record in records]
    return [(record.key, record.caption) for record in records]


def load_image(source: Path | bytes, height: int, width: int, name: str | None = None) -> torch.Tensor:
    """The pixels of `load_picture` in [-1, 1]."""
    return unit_range(load_picture(source, height, width, name).pixels)


def as_image(pixels: torch.Tensor) -> torch.Tensor:
    """Grey uint8 [H, W] -> the result of `load_image`."""
    return (pixels.float() / 127.5 - 1).expand(3, *pixels.shape)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks: bytes, width: int = 2, height: int = 2) -> bytes:
    """An RGB image made of chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(chunks)


BLACK = png_chunk(b"IDAT", zlib.compress(b"\0" * 14))


class TestCaptions:
    def test_beside_the_image(self, tmp_path):
        write_pair(tmp_path, "b.png", "  zweites Bild: 猫\n")
        write_pair(tmp_path, "a.jpg", "first")
        assert contents(tmp_path) == [("a.jpg", "first"), ("b.png", "zweites Bild: 猫")]

    def test_in_metadata(self, tmp_path):
        write_image(tmp_path / "a.png")
        write_image(tmp_path / "sub" / "b.png")
        write_metadata(tmp_path, [{"file_name": "sub/b.png", "text": "zwei"}, {"file_name": "a.png", "text": "one"}])
        with (tmp_path / "metadata.jsonl").open("a") as file:
            file.write("\n  \n")  # blank lines are skipped
        assert contents(tmp_path) == [("a.png", "one"), ("sub/b.png", "zwei")]

    def test_metadata_wins_over_the_text_file(self, tmp_path):
        write_pair(tmp_path, "a.png", "beside")
        write_pair(tmp_path, "b.png", "beside")
        write_metadata(tmp_path, [{"file_name": "b.png", "text": "listed"}])
        assert contents(tmp_path) == [("a.png", "beside"), ("b.png", "listed")]

    def test_a_missing_one_is_named_with_both_solutions(self, tmp_path):
        write_pair(tmp_path, "a.png", "a")
        write_image(tmp_path / "sub" / "b.jpeg")
        write_image(tmp_path / "sub" / "c.jpeg")
        with pytest.raises(UserError) as caught:
            ImageFolder(tmp_path)
        for part in ("2 of 3 images", str(tmp_path), "'sub/b.jpeg'", "'sub/b.txt'", "metadata.jsonl"):
            assert part in str(caught.value)

    @pytest.mark.parametrize("line", ["not json", '{"file_name": "a.png"}', '{"text": "a"}', "[1]", "5", "null"])
    def test_bad_line_of_metadata_is_named_by_number(self, tmp_path, line):
        write_image(tmp_path / "a.png")
        (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "fine"}}\n{line}\n')
        with pytest.raises(UserError, match=r"line 2 of .*metadata\.jsonl"):
            ImageFolder(tmp_path)

    def test_null_is_not_a_caption(self, tmp_path):
        write_image(tmp_path / "a.png")
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": null}\n')
        with pytest.raises(UserError, match=r"line 1 of .*metadata\.jsonl"):
            ImageFolder(tmp_path)

    def test_only_newlines_end_a_line_of_metadata(self, tmp_path):
        write_image(tmp_path / "a.png")
        write_metadata(tmp_path, [{"file_name": "a.png", "text": "one\u2028two"}], ensure_ascii=False)
        assert contents(tmp_path) == [("a.png", "one\u2028two")]

    @pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
    def test_text_that_is_not_utf8_is_named(self, tmp_path, name):
        write_pair(tmp_path, "a.png", "a")
        (tmp_path / name).write_bytes('{"file_name": "a.png", "text": "Bär"}'.encode("latin-1"))
        with pytest.raises(UserError, match=rf"{name}.*UTF-8"):
            ImageFolder(tmp_path)

    def test_byte_order_mark_is_not_part_of_the_caption(self, tmp_path):
        write_image(tmp_path / "a.png")
        (tmp_path / "a.txt").write_text("saved by a Windows editor", encoding="utf-8-sig")
        assert contents(tmp_path) == [("a.png", "saved by a Windows editor")]


class TestFolder:
    def test_order_is_by_name(self, tmp_path):
        for name in ("c.png", "sub/a.png", "b.png", "a10.png", "a9.png"):
            write_pair(tmp_path, name, name)
        assert [key for key, _ in contents(tmp_path)] == ["a10.png", "a9.png", "b.png", "c.png", "sub/a.png"]

    def test_suffixes_in_capitals_are_images_and_other_files_are_not(self, tmp_path):
        write_pair(tmp_path, "A.PNG", "capital")
        (tmp_path / "notes.md").write_text("no image")
        (tmp_path / "orphan.txt").write_text("a caption without an image")
        assert contents(tmp_path) == [("A.PNG", "capital")]

    def test_directory_with_an_images_name_is_searched_not_read(self, tmp_path):
        write_pair(tmp_path, "photos.png/a.png", "inside")
        assert contents(tmp_path) == [("photos.png/a.png", "inside")]

    def test_no_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"no folder '.*nowhere'"):
            ImageFolder(tmp_path / "nowhere")

    def test_no_image(self, tmp_path):
        (tmp_path / "a.txt").write_text("a caption without an image")
        with pytest.raises(UserError, match=r"has no images \(\.png, "):
            ImageFolder(tmp_path)

    def test_fingerprint_follows_names_captions_and_lengths(self, tmp_path):
        write_pair(tmp_path, "a.png", "a")
        found = [ImageFolder(tmp_path).fingerprint]
        assert ImageFolder(tmp_path).fingerprint == found[0]
        (tmp_path / "a.txt").write_text("b")
        found.append(ImageFolder(tmp_path).fingerprint)
        (tmp_path / "a.png").rename(tmp_path / "c.png")
        (tmp_path / "a.txt").rename(tmp_path / "c.txt")
        found.append(ImageFolder(tmp_path).fingerprint)
        with (tmp_path / "c.png").open("ab") as file:
            file.write(b"0")
        found.append(ImageFolder(tmp_path).fingerprint)
        write_pair(tmp_path, "d.png", "b")
        found.append(ImageFolder(tmp_path).fingerprint)
        assert len(set(found)) == 5

    def test_fingerprint_does_not_follow_the_place(self, tmp_path):
        for folder in ("one", "two"):
            write_pair(tmp_path / folder, "sub/a.png", "a")
        assert ImageFolder(tmp_path / "one").fingerprint == ImageFolder(tmp_path / "two").fingerprint
        for folder in ("one", "two"):  # the message of a missing caption names the folder
            write_image(tmp_path / folder / "b.png")
        found = {ImageFolder(tmp_path / folder, strict=False).fingerprint for folder in ("one", "two")}
        assert len(found) == 1

    def test_errors_of_a_network_that_pass_change_nothing(self, tmp_path, monkeypatch, capsys):
        """Also not the fingerprint, by which a resumed run would be refused."""
        write_pair(tmp_path, "a.png", "a")
        write_pair(tmp_path, "sub/b.png", "b")
        expected, failed = ImageFolder(tmp_path), set()

        def once(function):
            def failing(first, *arguments):
                if (function, first) not in failed:
                    failed.add((function, first))
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
                return function(first, *arguments)

            return failing

        monkeypatch.setattr(Path, "read_bytes", once(Path.read_bytes))
        monkeypatch.setattr(folder_module, "_content_mark", once(folder_module._content_mark))
        monkeypatch.setattr(folder_module, "image_size", once(image_size))
        monkeypatch.setattr(os, "scandir", once(os.scandir))
        found = ImageFolder(tmp_path)
        assert (found.fingerprint, found.marks) == (expected.fingerprint, expected.marks)
        assert found.sizes().tolist() == [[8, 8]] * 2
        assert len(failed) == 8 and capsys.readouterr().out.count("Stale file handle; it is read again") == 8

    def test_record_has_only_the_image_and_its_caption(self, tmp_path):
        write_pair(tmp_path, "a.png", "a")
        dataset = ImageFolder(tmp_path)
        for size in ((4, 6), (8, 2)):
            assert dataset.load(0, size).image.shape == (3, *size)
        record = dataset.load(0, (4, 6))
        assert (record.latents, record.fields) == (None, {})

    def test_sizes_of_the_images(self, tmp_path):
        for name, size in (("a.png", (4, 9)), ("b.jpg", (30, 2)), ("c.webp", (5, 5))):
            write_image(tmp_path / name, torch.zeros(*size, 3, dtype=torch.uint8))
            (tmp_path / name).with_suffix(".txt").write_text("a")
        assert ImageFolder(tmp_path).sizes().tolist() == [[4, 9], [30, 2], [5, 5]]
        (tmp_path / "b.jpg").write_bytes(b"no image")
        with pytest.raises(BadData, match=rf"{tmp_path}/b.jpg is not a readable image"):
            ImageFolder(tmp_path).sizes()
        write_pair(tmp_path, "d.png", "d")
        write_pair(tmp_path, "e.png", "e")
        sizes = ImageFolder(tmp_path).sizes(strict=False).tolist()
        assert sizes == [[4, 9], [8, 8], [5, 5], [8, 8], [8, 8]], "the most frequent, of which there are substitutes"

    def test_sizes_are_read_in_threads(self, tmp_path, monkeypatch):
        """Two headers are read at the same time: on a network each takes a millisecond."""
        for number in range(300):
            (tmp_path / f"{number:03d}.png").touch()
            (tmp_path / f"{number:03d}.txt").write_text("a")
        dataset, both = ImageFolder(tmp_path), threading.Barrier(2, timeout=10)

        def image_size(path: Path, _: str) -> tuple[int, int]:
            if path.name in ("000.png", "256.png"):
                both.wait()
            return int(path.stem) + 1, 7

        monkeypatch.setattr(folder_module, "image_size", image_size)
        assert dataset.sizes().tolist() == [[number + 1, 7] for number in range(300)]


class TestBadImages:
    def refused(self, tmp_path: Path, content: bytes, name: str = "bad.png") -> None:
        path = tmp_path / name
        path.write_bytes(content)
        path.with_suffix(".txt").write_text("a caption")
        dataset = ImageFolder(tmp_path)  # images are opened when they are needed
        message = "{} is not a readable image.*Remove it or replace it"
        with pytest.raises(BadData, match=message.format(path)):
            dataset.load(0, (8, 8))
        with pytest.raises(BadData, match=message.format("sample 'a' of shard b")):
            load_image(content, 8, 8, name="sample 'a' of shard b")

    @pytest.mark.parametrize("name", ["bad.png", "bad.jpg", "bad.webp", "bad.bmp"])
    @pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>"], ids=["empty", "html"])
    def test_not_an_image(self, tmp_path, content, name):
        self.refused(tmp_path, content, name)

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (b"", "it is empty"),
            (bytes(5000), "it has only zero bytes, as a power failure leaves a file"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
            (b"\n<!DOCTYPE html><html>404", "it is a page, which a failed download leaves"),
            (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "it is HEIC, whatever its suffix: convert it to JPEG"),
            (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "AppleDouble"),
            (b"PK\x03\x04\x14\0", "it is an archive"),
            (b"no image at all", "its content is of none of the formats PNG, JPEG, "),
        ],
        ids=["empty", "zeros", "lfs", "html", "heic", "appledouble", "zip", "text"],
    )
    def test_says_what_it_is_instead(self, tmp_path, content, why):
        (tmp_path / "a.jpg").write_bytes(content)
        for source in (tmp_path / "a.jpg", content):
            with pytest.raises(BadData, match=rf"is not a readable image \(.*{why}"):
                load_image(source, 8, 8, name="sample")

    def test_grey_without_a_range_is_refused(self, tmp_path):
        Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "a.tiff")
        with pytest.raises(BadData, match="its grey values of float32 have no fixed range; save it with 8 or 16 bits"):
            load_image(tmp_path / "a.tiff", 8, 8)

    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
    @pytest.mark.parametrize(
        "name", ["bad.png", "bad.jpg", "bad.webp", "bad.bmp", "bad.gif", "bad.tiff", "bad.avif", "bad.jp2"]
    )
    def test_truncated(self, tmp_path, name, kept):
        noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        content = write_image(tmp_path / name, noise).read_bytes()
        self.refused(tmp_path, content[: int(kept * len(content))], name)

    def test_damaged_avif(self, tmp_path):
        """Its decoder raises RuntimeError."""
        content = bytearray(write_image(tmp_path / "a.avif", torch.zeros(16, 16, 3, dtype=torch.uint8)).read_bytes())
        begin = content.index(b"mdat") + 4
        content[begin : begin + 20] = bytes(20)
        (tmp_path / "a.avif").unlink()
        self.refused(tmp_path, bytes(content), "bad.avif")

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(png(BLACK, width=20_000, height=20_000), id="DecompressionBombError"),
            pytest.param(png(png_chunk(b"IDAT", b"\x78\x9c"), b"\0\0\0\1????" + bytes(5)), id="SyntaxError"),
            pytest.param(png(png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(65 << 20))), BLACK), id="ValueError"),
        ],
    )
    def test_any_error_of_pil(self, tmp_path, content):
        self.refused(tmp_path, content)


class TestPixels:
    def test_range_dtype_and_channels(self, tmp_path):
        pixels = torch.tensor([[[0, 0, 0], [255, 255, 255]], [[255, 0, 0], [0, 0, 51]]], dtype=torch.uint8)
        image = load_image(write_image(tmp_path / "a.png", pixels), 2, 2)
        assert image.dtype == torch.float32
        assert image[:, 0, 0].tolist() == [-1, -1, -1]
        assert image[:, 0, 1].tolist() == [1, 1, 1]
        assert image[:, 1, 0].tolist() == [1, -1, -1]  # red comes first
        torch.testing.assert_close(image[:, 1, 1], torch.tensor([-1, -1, -0.6]))

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
    def test_every_mode_becomes_three_channels(self, tmp_path, mode):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new("RGB", (6, 6), (255, 255, 255)).convert(mode).save(tmp_path / f"a.{suffix}")
        assert torch.equal(load_image(tmp_path / f"a.{suffix}", 6, 6), torch.ones(3, 6, 6))

    def test_grey_is_the_same_in_all_channels(self, tmp_path):
        ramp = torch.arange(64, dtype=torch.uint8).view(8, 8)
        assert torch.equal(load_image(write_image(tmp_path / "a.png", ramp), 8, 8), as_image(ramp))

    @pytest.mark.parametrize(
        ("background", "shown"), [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("#ff8000", (255, 128, 0))]
    )
    @pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "P in bytes", "RGB key", "L key", "webp"])
    def test_transparent_parts_show_the_background(self, tmp_path, kind, background, shown):
        """The left half is opaque and dark, the right half is transparent with a hidden colour."""
        pixels = torch.zeros(4, 8, 4, dtype=torch.uint8)
        pixels[..., :3], pixels[:, :4, 3] = torch.tensor([200, 10, 90]), 255
        pixels[:, :4, :3] = 51
        path, image = tmp_path / f"a.{'webp' if kind == 'webp' else 'png'}", Image.fromarray(pixels.numpy())
        if kind == "webp":
            image.save(path, lossless=True, exact=True)
        elif kind.endswith("key"):  # tRNS: one colour is transparent
            mode = kind.split()[0]
            plain = image.convert("RGB").convert(mode)
            plain.save(path, transparency=plain.getpixel((7, 0)))
        elif kind.startswith("P"):
            indexed = Image.fromarray(np.repeat(np.array([[0, 1]], np.uint8), [4, 4], axis=1).repeat(4, 0), "P")
            indexed.putpalette([51, 51, 51, 200, 10, 90])
            indexed.save(path, transparency=1 if kind == "P" else b"\xff\x00")
        else:
            image.convert(kind).save(path)
        picture = load_picture(path, 4, 8, background=background)
        assert picture.pixels[:, 0, 0].tolist() == [51, 51, 51]
        assert picture.pixels[:, 0, 7].tolist() == list(shown)
        assert picture.notes == picture_notes(path, (4, 8), "a") == (TRANSPARENT,)

    @pytest.mark.parametrize("stored", [(16, 28), (26, 16), (128, 16)])
    def test_an_image_that_is_mostly_cut_off_is_noted(self, tmp_path, stored):
        """16 x 26 in a square keeps 0.62 of the image, 16 x 28 only 0.57."""
        path = write_image(tmp_path / "a.png", torch.zeros(*stored, dtype=torch.uint8))
        notes = () if stored == (26, 16) else (CROPPED,)
        assert load_picture(path, 16, 16).notes == picture_notes(path, (16, 16), "a") == notes

    @pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
    def test_the_workflow_in_a_png_may_be_large(self, kind):
        """ComfyUI stores its workflow in each image; PIL's own limit is 1 MiB."""
        head = {b"zTXt": b"workflow\0\0", b"iTXt": b"workflow\0\1\0\0\0", b"iCCP": b"icc\0\0"}[kind]
        content = png(png_chunk(kind, head + zlib.compress(b"x" * (3 << 20))), BLACK)
        assert load_image(content, 2, 2, name="x").max() == -1

    def test_opaque_alpha_is_not_transparent(self, tmp_path):
        path = write_image(tmp_path / "a.png", torch.full((4, 4, 4), 255, dtype=torch.uint8))
        assert load_picture(path, 4, 4).notes == picture_notes(path, (4, 4), "a") == ()

    def test_unit_range_has_the_bits_of_ieee_division(self):
        """No reciprocal, which is off by a bit for some values: a run must not depend on where pixels become numbers."""
        values = np.arange(256, dtype=np.uint8)
        ours = unit_range(torch.from_numpy(values).view(1, 16, 16)).flatten().numpy()
        assert ours.dtype == np.float32
        right = values.astype(np.float32) / np.float32(127.5) - np.float32(1)
        assert np.array_equal(ours.view(np.int32), right.view(np.int32))
        reciprocal = values.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)
        assert not np.array_equal(reciprocal, right)

    def test_pixels_are_those_of_the_resize_without_rounding(self, tmp_path):
        """uint8 loses nothing: PIL's resize and colour conversion give 8 bits."""
        noise = torch.randint(0, 256, (3, 31, 47), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        Image.fromarray(noise.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
        picture = load_picture(tmp_path / "a.png", 16, 24)
        assert picture.pixels.dtype == torch.uint8 and picture.pixels.is_contiguous()
        fitted = ImageOps.fit(Image.open(tmp_path / "a.png"), (24, 16), method=Image.Resampling.LANCZOS)
        before = torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1  # in the worker, until now
        assert torch.equal(unit_range(picture.pixels), before)

    @pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff", "avif"])
    def test_of_several_frames_the_first_is_taken(self, tmp_path, suffix):
        frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        picture = load_picture(path, 4, 4)
        assert picture.notes == picture_notes(path, (4, 4), "a") == (ANIMATED,)
        torch.testing.assert_close(picture.pixels[:, 0, 0].int(), torch.tensor([255, 0, 0]).int(), atol=2, rtol=0)

    def test_a_cameras_jpeg_with_previews_is_one_picture(self, tmp_path):
        """MPO: JPEGs one after the other, under the suffix .jpg."""
        frames = [Image.new("RGB", size, colour) for size, colour in (((8, 8), "red"), ((4, 4), "blue"))]
        frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
        picture = load_picture(tmp_path / "a.jpg", 8, 8)
        assert picture.notes == ()
        torch.testing.assert_close(picture.pixels[:, 0, 0].int(), torch.tensor([255, 0, 0]).int(), atol=2, rtol=0)

    @pytest.mark.parametrize(("stored", "is_small"), [((16, 16), False), ((15, 16), True), ((16, 12), True)])
    def test_an_image_that_is_enlarged_is_noted(self, tmp_path, stored, is_small):
        path = write_image(tmp_path / "a.png", torch.zeros(*stored, dtype=torch.uint8))
        notes = (ENLARGED,) if is_small else ()
        assert load_picture(path, 16, 16).notes == picture_notes(path, (16, 16), "a") == notes

    def test_colours_of_a_profile_become_srgb(self, tmp_path):
        """A profile whose red and blue are exchanged, as no real one is: so the conversion cannot be missed."""
        swapped = ImageCms.createProfile("sRGB")
        content = bytearray(ImageCms.ImageCmsProfile(swapped).tobytes())
        at, end = content.index(b"rXYZ"), content.index(b"bXYZ")
        content[at : at + 4], content[end : end + 4] = b"bXYZ", b"rXYZ"
        content = (
            bytes(content).replace(b"sRGB", b"swap").replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
        )
        Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png", icc_profile=content)
        torch.testing.assert_close(
            load_image(tmp_path / "a.png", 4, 4)[:, 0, 0], torch.tensor([-1.0, -1, 1]), atol=0.05, rtol=0
        )

    @pytest.mark.parametrize(
        "profile",
        # It has the time at which it was made, which must not become the name of a test: it differs between workers.
        [b"damaged", pytest.param(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), id="lab")],
    )
    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    def test_a_profile_that_does_not_fit_is_ignored(self, tmp_path, mode, profile):
        path = tmp_path / "a.jpg"
        Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path, icc_profile=profile)
        assert torch.equal(load_image(path, 8, 8), torch.ones(3, 8, 8))

    @pytest.mark.parametrize(
        ("bits", "white_is_zero", "value", "expected"), [(12, 0, 0x800, 128), (16, 1, 0, 255), (8, 1, 0, 255)]
    )
    def test_grey_of_a_scanner(self, tmp_path, bits, white_is_zero, value, expected):
        """Tags of TIFF: 12 bits are in the lower part of PIL's 16, and white may be 0."""
        data = (
            (value.to_bytes(bits // 8, "little") * 8) if bits != 12 else ((value << 12 | value).to_bytes(3, "big") * 4)
        )
        tags = [
            (256, 4),
            (257, 2),
            (258, bits),
            (259, 1),
            (262, 1 - white_is_zero),
            (273, 122),
            (277, 1),
            (278, 2),
            (279, len(data)),
        ]
        entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, number) for tag, number in tags)
        head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
        (tmp_path / "a.tiff").write_bytes(head + entries + bytes(4) + data)
        assert load_image(tmp_path / "a.tiff", 2, 4).unique().tolist() == pytest.approx(
            [expected / 127.5 - 1], abs=1e-6
        )

    @pytest.mark.parametrize(("suffix", "mode"), [("tiff", "I;16"), ("tiff", "I;16B"), ("tiff", "RGB"), ("jp2", "RGB")])
    def test_scans_and_archives(self, tmp_path, suffix, mode):
        ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
        if mode == "RGB":
            Image.fromarray(ramp).convert("RGB").save(tmp_path / f"a.{suffix}")
        else:
            dtype = ">u2" if mode.endswith("B") else "<u2"
            Image.fromarray((ramp.astype(np.uint16) * 257).astype(dtype)).save(tmp_path / f"a.{suffix}")
        torch.testing.assert_close(
            load_image(tmp_path / f"a.{suffix}", 8, 8), as_image(torch.from_numpy(ramp)), atol=0.01, rtol=0
        )

    def test_sixteen_bits_keep_their_scale(self, tmp_path):
        ramp = torch.arange(64, dtype=torch.int32).view(8, 8)
        Image.fromarray((ramp * 257).numpy().astype("uint16")).save(tmp_path / "a.png")
        torch.testing.assert_close(load_image(tmp_path / "a.png", 8, 8), as_image(ramp), atol=0.01, rtol=0)

    @pytest.mark.parametrize(
        ("orientation", "turn"),
        [
            (1, lambda pixels: pixels),
            (2, torch.fliplr),
            (3, lambda pixels: pixels.rot90(2)),
            (4, torch.flipud),
            (5, torch.t),
            (6, lambda pixels: pixels.rot90(-1)),  # 90 degrees clockwise: the left side of the file is displayed on top
            (7, lambda pixels: pixels.rot90(2).t()),
            (8, lambda pixels: pixels.rot90(1)),
        ],
    )
    def test_exif_orientation_is_applied(self, tmp_path, orientation, turn):
        stored = torch.arange(32, dtype=torch.uint8).view(4, 8)
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = write_image(tmp_path / "a.png", stored, exif=exif)
        shown = as_image(turn(stored))
        assert torch.equal(load_image(path, *shown.shape[1:]), shown)

    @pytest.mark.parametrize(
        ("tag", "kind", "value"),
        [(0x010E, 5, 0), (0x0128, 4, 1 << 31), (0x011A, 2, 0)],
        ids=["rational description", "large unit", "text for a resolution"],
    )
    def test_other_exif_tags_do_not_matter(self, tmp_path, tag, kind, value):
        """Cameras and editors often write them wrong; the image is valid."""
        stored = torch.arange(32, dtype=torch.uint8).view(4, 8)
        entries = sorted([(0x0112, 3, 1, 6), (tag, kind, 1, value)])
        exif = (
            b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(64)
        )
        shown = load_image(write_image(tmp_path / "a.png", stored, exif=exif), 8, 4)
        assert torch.equal(shown, as_image(stored.rot90(-1)))


class TestContent:
    """An image as bytes, as in a shard."""

    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
    def test_is_read_as_the_file(self, tmp_path, name):
        noise = torch.randint(256, (20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        path = write_image(tmp_path / name, noise)
        assert torch.equal(load_image(path.read_bytes(), 8, 8, name="x"), load_image(path, 8, 8))
        assert image_size(path.read_bytes(), "x") == image_size(path, "x") == (20, 30)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", ["png", "jpg"])
    def test_size_is_as_displayed(self, tmp_path, orientation, suffix):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = write_image(tmp_path / f"a.{suffix}", torch.zeros(10, 30, dtype=torch.uint8), exif=exif)
        assert image_size(path, "x") == ((30, 10) if orientation >= 5 else (10, 30))

    @pytest.mark.parametrize("name", ["a.png", "a.jpg"])
    def test_size_needs_only_the_header(self, tmp_path, name):
        noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        content = write_image(tmp_path / name, noise).read_bytes()
        assert image_size(content[: len(content) // 2], "x") == (64, 64)

    def test_size_of_bytes_that_are_not_an_image(self):
        with pytest.raises(BadData, match="sample 'a' is not a readable image"):
            image_size(b"no image", "sample 'a'")

    @pytest.mark.parametrize("size", [(32, 32), (30, 60), (64, 16)])
    @pytest.mark.parametrize("stored", [(512, 512), (320, 960)])
    def test_large_jpegs_are_decoded_smaller_and_look_the_same(self, tmp_path, size, stored):
        """libjpeg scales by powers of two. Enough pixels remain: the image differs by one or two levels."""
        rows, columns = torch.meshgrid(torch.arange(stored[0]), torch.arange(stored[1]), indexing="ij")
        smooth = (torch.stack([rows / stored[0], columns / stored[1], (rows + columns) / sum(stored)], -1) * 255).byte()
        path = write_image(tmp_path / "a.jpg", smooth, quality=95)
        lossless = write_image(tmp_path / "a.png", torch.from_numpy(np.array(Image.open(path))))
        image = load_image(path, *size)
        assert image.shape == (3, *size)
        assert float((image - load_image(lossless, *size)).abs().max()) < 3 / 127.5

    def test_large_jpegs_are_not_decoded_too_small(self, tmp_path):
        """Stripes that are one pixel wide in the result."""
        stripes = (torch.arange(512) // 4 % 2 * 255).byte().expand(512, 512)
        path = write_image(tmp_path / "a.jpg", stripes, quality=95)
        columns = load_image(path, 128, 128)[0].mean(0)
        assert float((columns[1::2] - columns[::2]).min()) > 1.5


class TestCrop:
    """Without resampling the pixels are exact."""

    def test_wide_image_loses_its_sides_evenly(self, tmp_path):
        wide = torch.arange(8 * 24, dtype=torch.uint8).view(8, 24)
        path = write_image(tmp_path / "a.png", wide)
        assert torch.equal(load_image(path, 8, 8), as_image(wide[:, 8:16]))

    def test_tall_image_loses_top_and_bottom_evenly(self, tmp_path):
        tall = torch.arange(24 * 8, dtype=torch.uint8).view(24, 8)
        path = write_image(tmp_path / "a.png", tall)
        assert torch.equal(load_image(path, 8, 8), as_image(tall[8:16]))

    @pytest.mark.parametrize(("height", "width"), [(4, 8), (8, 4)])
    def test_height_comes_first(self, tmp_path, height, width):
        square = torch.arange(64, dtype=torch.uint8).view(8, 8)
        image = load_image(write_image(tmp_path / "a.png", square), height, width)
        top, left = (8 - height) // 2, (8 - width) // 2
        assert torch.equal(image, as_image(square[top : top + height, left : left + width]))

    def test_large_image_is_shrunk_to_cover_before_it_is_cropped(self, tmp_path):
        """The middle 32 x 32 of 32 x 64 remain; the left half is white."""
        stored = torch.zeros(32, 64, dtype=torch.uint8)
        stored[:, 16:32] = 255
        image = load_image(write_image(tmp_path / "a.png", stored), 8, 8)
        assert (image[:, :, :4] > 0.5).all()
        assert (image[:, :, 4:] < -0.5).all()

    def test_small_image_is_enlarged_to_cover(self, tmp_path):
        stored = torch.full((3, 5), 200, dtype=torch.uint8)
        image = load_image(write_image(tmp_path / "a.png", stored), 16, 24)
        assert torch.equal(image, as_image(torch.full((16, 24), 200, dtype=torch.uint8)))
