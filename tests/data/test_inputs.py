"""What people's own folders hold: names, links, captions and metadata as their tools and systems write them."""

import codecs
import io
import json
import os
import shutil
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_tools.index import index
from data_tools.pack import pack
from data_tools.validate import validate
from scfm_core.data.corpus import Corpus
from scfm_core.data.folder import ImageFolder
from scfm_core.data.recipe import DataConfig, SourceConfig
from scfm_core.data.schema import BadData
from scfm_core.data.text import check_text, decode_text
from scfm_core.errors import UserError
from scfm_core.train.prompts import read_prompts

NFC, NFD = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))


def image(path: Path, colour: str = "white", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path, **options)
    return path


def pair(path: Path, caption: str = "a") -> Path:
    image(path).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def listed(folder: Path, *rows: dict[str, Any] | str, name: str = "metadata.jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def row(file_name: str, text: str = "one") -> dict[str, str]:
    return {"file_name": file_name, "text": text}


def captions(folder: Path, **options: Any) -> dict[str, str]:
    found = ImageFolder(folder, **options)
    return {found.key(number): found.caption(number) for number in range(len(found))}


class TestText:
    @pytest.mark.parametrize(
        "content",
        [
            "Bär 🦊".encode(),
            "Bär 🦊".encode("utf-8-sig"),
            codecs.BOM_UTF16_LE + "Bär 🦊".encode("utf-16-le"),
            codecs.BOM_UTF16_BE + "Bär 🦊".encode("utf-16-be"),
            codecs.BOM_UTF32_LE + "Bär 🦊".encode("utf-32-le"),
        ],
        ids=["utf-8", "utf-8 with mark", "utf-16", "utf-16 big-endian", "utf-32"],
    )
    def test_is_decoded_if_its_encoding_is_certain(self, content):
        assert decode_text(content, "a.txt") == "Bär 🦊"

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            ("Bär".encode("latin-1"), r"is not UTF-8 text \(invalid continuation byte at byte 1\). Save it as UTF-8"),
            (codecs.BOM_UTF16_LE + b"a", "is not text of its byte order mark, UTF-16"),
            ("one".encode("utf-16-le"), "has a NUL character at 1: perhaps it is UTF-16 without a byte order mark"),
            (bytes(300), "has only NUL characters, as a power failure leaves a file"),
            (b"one\0", "has a NUL character at 3"),
            (b"cut \xf0\x9f", "is not UTF-8 text .unexpected end of data at byte 4"),
        ],
        ids=["latin-1", "half of utf-16", "utf-16 without mark", "zeros", "a zero", "half of an emoji"],
    )
    def test_is_refused_if_not(self, content, why):
        with pytest.raises(BadData, match=f"data: a.txt {why}"):
            decode_text(content, "a.txt")

    @pytest.mark.parametrize("text", ["a digit \ud83d", "\udd8a", "\udce9"])
    def test_half_of_a_character_is_refused(self, text):
        with pytest.raises(
            BadData, match=r"line 3 has half of a character, '\\ud[0-9a-f]{3}', at \d: it was probably cut"
        ):
            check_text(text, "line 3")

    def test_whole_pairs_and_control_characters_are_kept(self):
        text = json.loads(r'"\ud83e\udd8a\u000b\u200d\u007f"')
        assert check_text(text, "x") == "🦊\x0b\u200d\x7f"

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    @pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
    def test_prompts_are_read_by_the_same_rule(self, tmp_path, encoding, newline):
        (tmp_path / "p.txt").write_bytes(newline.join(["a Bär", "", "two\x0cthree"]).encode(encoding))
        assert read_prompts(str(tmp_path / "p.txt"), "prompts") == ["a Bär", "two\x0cthree"]

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("p.txt", "Bär".encode("latin-1")),
            ("p.json", b'{"annotations": [{"image_id": 1, "caption": "half \\ud83d"}]}'),
        ],
    )
    def test_prompts_that_are_not_text_are_refused(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"^sample.prompts: .*{name}' (is not UTF-8|has half of a character)"):
            read_prompts(str(tmp_path / name), "sample.prompts")

    def test_a_byte_order_mark_that_was_taken_for_text_is_dropped(self):
        assert decode_text(codecs.BOM_UTF8 * 2 + b"a cat", "x") == check_text("\ufeffa cat", "x") == "a cat"


class TestCaptionFiles:
    @pytest.mark.parametrize(
        ("picture", "file"),
        [
            ("k.png", "k.txt"), ("k.PNG", "k.TXT"), ("K.png", "k.txt"), ("k.png", "k.caption"), ("k.png", "k.png.txt"),
            ("a,b;c.png", "a,b;c.txt"), ("🦊 v1.2.final.PNG", "🦊 v1.2.final.txt"), ("100%[x]{y}.Png", "100%[x]{y}.txt"),
            (NFD, NFC.replace("png", "txt")), (NFC, NFD.replace("png", "txt")), ("no suffix . .png", "no suffix . .txt"),
        ],
    )  # fmt: skip
    def test_are_found(self, tmp_path, picture, file):
        image(tmp_path / picture)
        (tmp_path / file).write_text("one")
        assert captions(tmp_path) == {picture: "one"}

    def test_the_exact_name_wins(self, tmp_path):
        for name in ("k.png", "K.png"):
            pair(tmp_path / name, name)
        (tmp_path / "k.caption").write_text("not read")
        found = ImageFolder(tmp_path)
        assert captions(tmp_path) == {"K.png": "K.png", "k.png": "k.png"}
        assert found.notes == ["caption files without an image: 1, for example k.caption"]

    def test_one_for_two_images_is_said(self, tmp_path):
        pair(tmp_path / "k.png")
        image(tmp_path / "k.jpg")
        assert captions(tmp_path) == {"k.jpg": "a", "k.png": "a"}
        assert ImageFolder(tmp_path).notes == [
            "images that share the caption file of another image: 1, for example k.png"
        ]

    def test_a_similar_name_is_mentioned(self, tmp_path):
        pair(tmp_path / "photo_1.png")
        (tmp_path / "photo_1.txt").rename(tmp_path / "photo-1.txt")
        with pytest.raises(
            UserError, match=r"1 of 1 images have no caption. The first: 'photo_1.png' .*\(there is 'photo-1.txt'\)"
        ):
            ImageFolder(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"\xef\xbb\xbf"])
    def test_an_empty_one_is_a_caption(self, tmp_path, content):
        image(tmp_path / "a.png")
        (tmp_path / "a.txt").write_bytes(content)
        assert captions(tmp_path) == {"a.png": ""}


class TestInvalidCaptions:
    """Tolerated as other invalid samples are; `validate` sees them."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        for number in range(4):
            pair(tmp_path / f"{number}.png", f"caption {number}")
        return tmp_path

    def spoil(self, folder: Path, kind: str) -> str:
        if kind == "missing":
            (folder / "2.txt").unlink()
            return "has no caption"
        if kind == "row":
            listed(folder, r'{"file_name": "2.png", "text": "half \ud83d"}')
            return "line 1 of .*metadata.jsonl has half of a character"
        (folder / "2.txt").write_bytes("Bär".encode("latin-1") if kind == "latin-1" else bytes(40))
        return "2.txt is not UTF-8 text" if kind == "latin-1" else "2.txt has only NUL characters"

    @pytest.mark.parametrize("kind", ["missing", "row", "latin-1", "zeros"])
    def test_each(self, folder, kind):
        why = self.spoil(folder, kind)
        options: dict[str, Any] = {"path": str(folder), "format": "folder", "resolution": (8, 8)}
        with pytest.raises(UserError, match=why):
            Corpus(DataConfig(**options))
        corpus = Corpus(DataConfig(**options, max_bad_fraction=0.5))
        for _ in range(2):
            with pytest.raises(BadData, match=why):
                corpus.record(2)
        assert corpus.record(3).caption == "caption 3"
        for decode in (True, False):
            assert [problem.key for problem in validate(corpus, decode=decode)] == ["2.png"]


class TestMetadata:
    @pytest.mark.parametrize(
        ("file", "name"),
        [
            ("sub/x.png", "sub/x.png"), ("sub/x.png", "./sub/x.png"), ("sub/x.png", r"sub\x.png"), ("sub/x.png", r".\sub\x.png"),
            ("sub/x.png", "sub/../sub//x.png"), ("sub/x.png", "Sub/X.PNG"), ("sub/x.png", r"C:\data\mine\sub\x.png"),
            ("sub/x.png", "/home/someone/mine/sub/x.png"), (NFD, NFC), (NFC, NFD), (r"sub\x.png", r"sub\x.png"),
            ("a b/ü 1.png", r"A B\Ü 1.png"),
        ],
    )  # fmt: skip
    def test_the_image_of_a_row_is_found(self, tmp_path, file, name):
        image(tmp_path / file)
        listed(tmp_path, row(name))
        assert captions(tmp_path) == {file: "one"}
        assert ImageFolder(tmp_path).notes == []

    def test_a_name_that_may_be_two_images_is_refused(self, tmp_path):
        for name in ("x.png", "X.png"):
            image(tmp_path / name)
        listed(tmp_path, row("x.PNG"))
        with pytest.raises(
            UserError, match=r"line 1 of .* names 'x.PNG', which may be 'X.png' or 'x.png'. Write the exact"
        ):
            ImageFolder(tmp_path)

    @pytest.mark.parametrize(
        ("name", "near"), [("gone.png", ""), ("x.jpeg", " .there is 'x.png'."), ("train/x.png", " .there is 'x.png'.")]
    )
    def test_a_row_without_an_image_is_said(self, tmp_path, name, near):
        pair(tmp_path / "x.png", "beside")
        listed(tmp_path, row(name), row("another.png"), row("../x.png"))
        assert captions(tmp_path) == {"x.png": "beside"}
        [note] = ImageFolder(tmp_path).notes
        assert (
            note.replace("(", ".").replace(")", ".")
            == f"rows of metadata without an image: 3, for example '{name}'{near}"
        )

    @pytest.mark.parametrize("name", ["", "/", ".", "..", "half \\ud83d.png", "a\\u0000b", "C:"])
    def test_a_name_that_is_none_is_a_row_without_an_image(self, tmp_path, name):
        pair(tmp_path / "x.png")
        listed(tmp_path, f'{{"file_name": "{name}", "text": "one"}}')
        [note] = ImageFolder(tmp_path).notes
        assert note.startswith("rows of metadata without an image: 1, for example ")
        note.encode()

    def test_two_rows_for_one_image(self, tmp_path):
        image(tmp_path / "x.png")
        listed(tmp_path, row("x.png"), row("./x.png"))
        assert captions(tmp_path) == {"x.png": "one"}
        [note] = ImageFolder(tmp_path).notes
        assert note.startswith("rows of metadata that repeat another row: 1, for example line 2 of ")
        listed(tmp_path, row("x.png"), row("X.png", "two"))
        with pytest.raises(UserError, match=r"line 1 of \S+ and line 2 of \S+ give the image 'x.png' two captions"):
            ImageFolder(tmp_path)

    def test_in_subfolders_the_nearest_counts(self, tmp_path):
        for name in ("x.png", "train/x.png", "train/deep/y.png"):
            image(tmp_path / name)
        listed(tmp_path, row("x.png", "top"), row("train/x.png", "far"), row("train/deep/y.png", "far"))
        listed(tmp_path / "train", row("x.png", "near"))
        assert captions(tmp_path) == {"x.png": "top", "train/deep/y.png": "far", "train/x.png": "near"}

    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_as_csv(self, tmp_path, separator, encoding):
        image(tmp_path / "train" / "x.png")
        lines = [
            separator.join(line) for line in (("text", "file_name", "id"), ('"a ""big"" cat,\nÄ; b"', "x.png", "1"))
        ]
        (tmp_path / "train" / "metadata.csv").write_bytes("\r\n".join([*lines, ""]).encode(encoding))
        assert captions(tmp_path) == {"train/x.png": 'a "big" cat,\nÄ; b'}

    @pytest.mark.parametrize(
        ("name", "content", "why"),
        [
            ("metadata.csv", "file_name,caption\nx.png,one\n", r"line 2 of .*metadata.csv is not .*KeyError\('text'\), but has 'file_name', 'caption'"),
            ("metadata.csv", "file_name,text\nx.png\n", "line 2 of .*metadata.csv is not .*both must be strings"),
            ("metadata.jsonl", '[\n{"file_name": "x.png", "text": "one"}\n]', "line 1 of .*metadata.jsonl is not"),
            ("metadata.jsonl", '{"file_name": "x.png", "text": "on', "line 1 of .*metadata.jsonl is not .*JSONDecodeError"),
            ("metadata.jsonl", '{"file_name": "x.png", "text": ' + "1" * 5000 + "}", "line 1 of .*metadata.jsonl is not .*ValueError"),
            ("metadata.jsonl", "[" * 100_000, "line 1 of .*metadata.jsonl is not .*RecursionError"),
            ("metadata.jsonl", "\0" * 50, "metadata.jsonl has only NUL characters"),
        ],
    )  # fmt: skip
    def test_invalid_lines_are_named(self, tmp_path, name, content, why):
        image(tmp_path / "x.png")
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=why):
            ImageFolder(tmp_path)

    def test_a_row_wins_over_a_caption_file_and_says_so(self, tmp_path):
        pair(tmp_path / "x.png", "beside")
        listed(tmp_path, row("x.png"))
        assert captions(tmp_path) == {"x.png": "one"}
        assert ImageFolder(tmp_path).notes == [
            "caption files of images that have a row of metadata: 1, for example x.txt"
        ]

    def test_under_another_name_it_is_mentioned(self, tmp_path):
        image(tmp_path / "images" / "x.png")
        listed(tmp_path, row("images/x.png"), name="metadata1000.jsonl")
        with pytest.raises(UserError, match=r"no caption.*Not used: \.jsonl files: 1, for example metadata1000\.jsonl"):
            ImageFolder(tmp_path)

    def test_its_other_keys_are_mentioned(self, tmp_path):
        image(tmp_path / "x.png")
        listed(tmp_path, '{"image": "x.png", "caption": "one"}')
        with pytest.raises(UserError, match=r"line 1 of .*KeyError\('file_name'\), but has 'image', 'caption'"):
            ImageFolder(tmp_path)


class TestArchives:
    """Tars as people's tools write them."""

    def records(
        self, folder: Path, *members: tuple[str, bytes], mode: str = "w", encoding: str = "utf-8"
    ) -> list[tuple[str, str]]:
        folder.mkdir()
        with tarfile.open(folder / "a.tar", mode, format=tarfile.USTAR_FORMAT, encoding=encoding) as tar:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        source = SourceConfig(name="a", uri=str(folder), captions={"txt": 1.0, "json.caption": 1.0})
        index(source, folder / "manifest.json", timeout=10)
        corpus = Corpus(DataConfig(sources=(source,), resolution=(8, 8)))
        records = [corpus.record(number) for number in range(len(corpus))]
        assert validate(corpus) == []
        return [(record.key, record.caption) for record in records]

    @pytest.fixture
    def png(self, tmp_path) -> bytes:
        return image(tmp_path / "x.png").read_bytes()

    def test_members_of_samples_in_any_order(self, tmp_path, png):
        members = [("b.txt", b"2"), ("a.png", png), ("b.png", png), ("a.txt", b"1")]
        assert self.records(tmp_path / "t", *members) == [("b", "2"), ("a", "1")]

    def test_of_macos(self, tmp_path, png):
        """`./` before each name, AppleDouble files beside each file, and in a folder of their own."""
        members = [
            ("./._a.png", b"x"),
            ("./a.png", png),
            ("./._a.txt", b"x"),
            ("./a.txt", b"1"),
            ("__MACOSX/._a.png", b"x"),
        ]
        assert self.records(tmp_path / "t", *members) == [("./a", "1")]

    def test_names_that_are_not_utf8(self, tmp_path, png):
        members = [("café.png", png), ("café.txt", b"1")]
        assert self.records(tmp_path / "t", *members, encoding="latin-1") == [(r"caf\xe9", "1")]

    @pytest.mark.parametrize("caption", ["Bär".encode("utf-16"), "Bär".encode("utf-8-sig"), "Bär".encode()])
    @pytest.mark.parametrize("field", ["txt", "json"])
    def test_captions_in_any_certain_encoding(self, tmp_path, png, caption, field):
        if field == "json":
            encoding = {b"\xff\xfe": "utf-16", b"\xef\xbb": "utf-8-sig"}.get(caption[:2], "utf-8")
            caption = '{"caption": "Bär"}'.encode(encoding)
        assert self.records(tmp_path / "t", ("a.png", png), (f"a.{field}", caption)) == [("a", "Bär")]

    @pytest.mark.parametrize(("mode", "program"), [("w:gz", "gunzip"), ("w:bz2", "bunzip2"), ("w:xz", "unxz")])
    def test_compressed_ones_are_refused_with_the_program(self, tmp_path, png, mode, program):
        with pytest.raises(UserError, match=f"shard .*a.tar is compressed. Unpack it with `{program}`"):
            self.records(tmp_path / "t", ("a.png", png), ("a.txt", b"1"), mode=mode)

    def test_a_dot_within_a_name_is_explained(self, tmp_path, png):
        with pytest.raises(
            UserError, match=r"sample 'v1' .* no jpg .* but 2 final\.png, .* after the first dot of a file's name"
        ):
            self.records(tmp_path / "t", ("v1.2 final.png", png), ("v1.2 final.txt", b"1"))

    def test_a_null_caption_is_refused(self, tmp_path, png):
        with pytest.raises(
            BadData, match=r"sample 'a' of shard .* has no caption in (txt, json.caption|json.caption, txt), but"
        ):
            self.records(tmp_path / "t", ("a.png", png), ("a.json", b'{"caption": null}'))


class TestNames:
    @pytest.mark.parametrize(
        "hidden",
        [
            "._x.png", ".ipynb_checkpoints/x-checkpoint.png", "__MACOSX/._x.png", "@eaDir/x.png/SYNOPHOTO_THUMB_M.jpg",
            ".Trash-1000/files/x.png", "#recycle/x.png", "$RECYCLE.BIN/x.png", "Thumbs.db", "desktop.ini", ".DS_Store",
        ],
    )  # fmt: skip
    def test_hidden_ones_are_left_out_and_counted(self, tmp_path, hidden):
        pair(tmp_path / "x.png")
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / hidden).write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X")
        assert captions(tmp_path) == {"x.png": "a"}
        assert ImageFolder(tmp_path).notes == [f"hidden names: 1, for example {hidden.partition('/')[0]}"]

    def test_the_folder_itself_may_be_hidden(self, tmp_path):
        pair(tmp_path / ".cache" / "x.png")
        assert captions(tmp_path / ".cache") == {"x.png": "a"}

    def test_other_files_are_counted_by_suffix(self, tmp_path):
        pair(tmp_path / "x.png")
        for name in ("a.heic", "b.HEIC", "c.psd", "x.npz", "LICENSE"):
            (tmp_path / name).write_bytes(b"x")
        notes = [
            ".heic files: 2, for example a.heic",
            ".npz files: 1, for example x.npz",
            ".psd files: 1, for example c.psd",
        ]
        assert sorted(ImageFolder(tmp_path).notes) == [*notes, "files without a suffix: 1, for example LICENSE"]

    def test_a_folder_of_other_files_says_what_it_holds(self, tmp_path):
        (tmp_path / "a.heic").write_bytes(b"x")
        with pytest.raises(
            UserError, match=r"has no images .*\.avif.*\. Left out: \.heic files: 1, for example a.heic"
        ):
            ImageFolder(tmp_path)

    @pytest.mark.parametrize("suffix", ["gif", "tif", "tiff", "avif", "jfif", "jpe", "jp2", "webp", "bmp"])
    def test_every_suffix_that_pil_decodes_is_taken(self, tmp_path, suffix):
        pair(tmp_path / f"x.{suffix}")
        assert ImageFolder(tmp_path).load(0, (8, 8)).image.float().mean() > 252

    def test_bytes_that_are_not_utf8(self, tmp_path):
        """As an archive of Windows leaves them on Linux; the name must be stored, printed and packed."""
        name = os.fsdecode("caf\xe9.png".encode("latin-1"))
        pair(tmp_path / "in" / name)
        listed(tmp_path / "in")
        corpus = Corpus(DataConfig(path=str(tmp_path / "in"), format="folder", resolution=(8, 8)))
        assert corpus.record(0).key == r"caf\xe9.png"
        assert validate(corpus) == []
        assert pack(corpus, tmp_path / "out", to="webdataset").samples == 1
        (tmp_path / "in" / name).write_bytes(b"")
        with pytest.raises(BadData, match=r"caf\\xe9.png is not a readable image") as caught:
            corpus.record(0)
        str(caught.value).encode()


class TestLinks:
    def test_folders_are_followed(self, tmp_path):
        for kind in ("cats", "dogs"):
            pair(tmp_path / "store" / kind / "x.png", kind)
            (tmp_path / "mix").mkdir(exist_ok=True)
            (tmp_path / "mix" / kind).symlink_to(f"../store/{kind}")
        pair(tmp_path / "mix" / "own.png", "own")
        assert captions(tmp_path / "mix") == {"cats/x.png": "cats", "dogs/x.png": "dogs", "own.png": "own"}
        assert ImageFolder(tmp_path / "mix").notes == []

    def test_no_folder_is_read_twice(self, tmp_path):
        """A loop, a link to a neighbour, two links to one folder outside: real folders keep their names."""
        pair(tmp_path / "in" / "z" / "x.png")
        pair(tmp_path / "out" / "y.png")
        for name, target in (
            ("in/a", "z"),
            ("in/z/up", ".."),
            ("in/o1", "../out"),
            ("in/o2", "../out"),
            ("out/back", "../in"),
        ):
            (tmp_path / name).symlink_to(target)
        assert captions(tmp_path / "in") == {"o1/y.png": "a", "z/x.png": "a"}
        assert ImageFolder(tmp_path / "in").notes == ["links to a folder that is read already: 4, for example a"]

    def test_links_to_nothing_are_counted(self, tmp_path):
        pair(tmp_path / "x.png")
        (tmp_path / "gone.png").symlink_to("nowhere.png")
        (tmp_path / "self").symlink_to("self")
        os.mkfifo(tmp_path / "pipe.png")
        assert captions(tmp_path) == {"x.png": "a"}
        assert sorted(ImageFolder(tmp_path).notes) == [
            "links to nothing: 2, for example gone.png",
            "pipes and devices: 1, for example pipe.png",
        ]

    def test_a_link_to_an_image_has_the_caption_beside_it(self, tmp_path):
        pair(tmp_path / "store" / "c.png", "of the store")
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "x.png").symlink_to("../store/c.png")
        (tmp_path / "in" / "x.txt").write_text("mine")
        assert captions(tmp_path / "in") == {"x.png": "mine"}

    def test_without_numbers_of_files(self, tmp_path, monkeypatch):
        """Some network file systems number every file 0."""
        pair(tmp_path / "a" / "x.png")
        pair(tmp_path / "b" / "y.png")
        (tmp_path / "b" / "loop").symlink_to("..")
        stat = Path.stat
        monkeypatch.setattr(
            Path,
            "stat",
            lambda self, **options: os.stat_result((*stat(self, **options)[:1], 0, *stat(self, **options)[2:])),
        )
        assert captions(tmp_path) == {"a/x.png": "a", "b/y.png": "a"}


class TestEditsInPlace:
    def fingerprint(self, folder: Path) -> str:
        return ImageFolder(folder).fingerprint

    @pytest.mark.parametrize("place", [0, 8000, 150_000, -3])
    def test_of_a_large_bitmap_are_noticed(self, tmp_path, place):
        """The edit is a line of pixels of a picture of 300 x 300."""
        path = tmp_path / "a.bmp"
        Image.new("RGB", (300, 300)).save(path)
        path.with_suffix(".txt").write_text("a")
        before, content = self.fingerprint(tmp_path), bytearray(path.read_bytes())
        begin = 54 + place if place >= 0 else len(content) - 900
        content[begin : begin + 900 * 6] = b"\xff" * min(900 * 6, len(content) - begin)
        path.write_bytes(content)
        assert self.fingerprint(tmp_path) != before

    def test_of_the_same_number_of_bytes_are_noticed(self, tmp_path):
        pair(tmp_path / "a.png")
        before = self.fingerprint(tmp_path)
        size = (tmp_path / "a.png").stat().st_size
        image(tmp_path / "a.png", "black")
        content = (tmp_path / "a.png").read_bytes()
        (tmp_path / "a.png").write_bytes(content.ljust(size, b"\0")[:size])
        assert self.fingerprint(tmp_path) != before

    def test_a_copy_with_other_times_is_the_same(self, tmp_path):
        pair(tmp_path / "one" / "a.png")
        shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
        os.utime(tmp_path / "two" / "a.png", (1, 1))
        assert self.fingerprint(tmp_path / "one") == self.fingerprint(tmp_path / "two")
