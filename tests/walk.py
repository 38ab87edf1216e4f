"""The walk of a newcomer: the commands of README and docs/, typed one after the other in an empty folder with an empty home.

    python tests/walk.py                       # all parts; writes docs/walk.md
    python tests/walk.py --folder F --only own_images play     # parts, in the folder F of an earlier walk

Every command stands on a page: a step names the page, and `tests/test_walk.py` looks for it there. The models are tiny, so words of
the commands are replaced (`STAND_INS`) and settings are added (`Step.tiny`); docs/walk.md shows the command as it was typed. A command
that ends in another way than the step says ends the walk. The first parts make what the later ones use.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests" / folder) for folder in ("slurm", "data", "distributed", "families", "recipes")]
PAGE = ROOT / "docs" / "walk.md"
LIMIT = 1500.0
"""Seconds for one command."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
"""States of a job that does not come back."""
STAND_INS = {
    "<this repository>": str(ROOT),
    "black-forest-labs/FLUX.1-dev": "runs/demo/short_teacher",
    "00127": "00003",
}
"""Words of the pages -> what this machine has."""


@dataclass
class Step:
    """One command of a page."""

    page: str
    """From the root of the repository."""
    command: str
    """As it stands there."""
    tiny: str = ""
    """Words that are added: tiny models, few steps."""
    words: dict[str, str] = field(default_factory=dict)
    """Further stand-ins."""
    says: str = ""
    """A regular expression that the output has."""
    code: int = 0
    """How it ends."""
    meanwhile: "Callable[[Walk, subprocess.Popen[bytes]], None] | None" = None
    """What happens while it runs."""
    where: str = "scfm"
    """Folder, in the walk's."""

    @property
    def typed(self) -> str:
        """The command as it is run."""
        command = self.command
        for word, stand_in in {**STAND_INS, **self.words}.items():
            command = command.replace(word, stand_in)
        return f"{command} {self.tiny}".strip()


@dataclass
class Act:
    """Something that a person does without a command of ours."""

    text: str
    """For docs/walk.md."""
    do: "Callable[[Walk], str | None]"
    """Returns what is to be shown."""


@dataclass
class Part:
    """A chapter of the walk."""

    title: str
    steps: list[Step | Act]
    around: "Callable[[Walk], contextlib.AbstractContextManager[None]] | None" = None
    """A service that runs meanwhile, which sets variables of the walk."""


class Walk:
    """A folder, a home, the variables of a shell, and what was seen.

    Args:
        folder: empty, or that of an earlier walk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.clone = folder, folder / "home", folder / "scfm"
        self.home.mkdir(parents=True, exist_ok=True)
        self.variables: dict[str, str] = {}
        self.output = ""
        """Of the command that runs, or ran last."""
        self.service: Any = None
        """Of the part: a cluster or a storage server."""

    def environment(self) -> dict[str, str]:
        """Of a new shell, and no more: nothing of this one helps. PYTHONPATH: the linked .venv has the package of another folder."""
        kept = {name: os.environ[name] for name in ("LANG", "TERM", "OMP_NUM_THREADS") if name in os.environ}
        return kept | {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.home),
            "PYTHONPATH": str(self.clone),
        } | self.variables  # fmt: skip

    def walk(self, name: str) -> None:
        """Walk a part, and keep what was seen in `NAME.json`."""
        part, rows = PARTS[name], []
        with part.around(self) if part.around else contextlib.nullcontext():
            for step in part.steps:
                began = time.monotonic()
                if isinstance(step, Act):
                    print(f"\n# {step.text}", flush=True)
                    row: dict[str, Any] = {"output": step.do(self) or ""}
                    print(row["output"], flush=True)
                else:
                    row = {"typed": self.without_paths(step.typed), "code": self.run(step), "output": self.output}
                row["output"] = self.without_paths(row["output"])
                rows.append(row | {"seconds": time.monotonic() - began})
        # One process is the walk's own.
        load = max(0.0, os.getloadavg()[2] - 1)
        kept = {"date": time.strftime("%Y-%m-%d"), "load": load, "rows": rows}
        (self.folder / f"{name}.json").write_text(json.dumps(kept, indent=1))

    def run(self, step: Step) -> int:
        """Type a command, wait for its end, and hold it against what the step says."""
        activate = "source .venv/bin/activate; " if step.where == "scfm" else ""
        print(f"\n$ {step.typed}", flush=True)
        began = latest = time.monotonic()
        silence, self.output = 0.0, ""
        process = subprocess.Popen(
            ["bash", "-c", activate + step.typed], cwd=self.folder / step.where, env=self.environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        killer = threading.Timer(LIMIT, lambda: os.killpg(process.pid, signal.SIGKILL))
        killer.start()
        other = threading.Thread(target=step.meanwhile, args=(self, process)) if step.meanwhile else None
        if other:
            other.start()
        assert process.stdout is not None
        while data := os.read(process.stdout.fileno(), 65536):
            silence, latest = max(silence, time.monotonic() - latest), time.monotonic()
            self.output += data.decode(errors="replace")
            print(data.decode(errors="replace"), end="", flush=True)
        code = process.wait()
        killer.cancel()
        seconds = time.monotonic() - began
        silence = max(silence, time.monotonic() - latest)
        if other:
            other.join()
        code = 128 - code if code < 0 else code
        print(f"[{seconds:.1f} s, silent for at most {silence:.1f} s, exit code {code}]", flush=True)
        if code != step.code or not re.search(step.says, self.output):
            raise SystemExit(f"the walk ends: exit code {code}, expected {step.code}, and {step.says!r} in the output")
        return code

    def without_paths(self, text: str) -> str:
        """A text without the folders of this machine."""
        for path, name in ((self.clone, "~/scfm"), (self.home, "~"), (self.folder, "~"), (ROOT, "<this repository>")):
            text = text.replace(str(path), name)
        return re.sub(r"(/[\w.-]+)+/site-packages", "site-packages", text)

    def until(self, condition: Callable[[], object], what: str, seconds: float = LIMIT) -> None:
        """Wait."""
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"{what} did not come within {seconds:g} s")
            time.sleep(0.5)

    def steps_of(self, run: str) -> int:
        """How many steps of a run are done."""
        path = self.clone / run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.is_file() else 0


# What happens while a command runs.


def interrupt(run: str, number: signal.Signals, after: int) -> Callable[[Walk, "subprocess.Popen[bytes]"], None]:
    """Send a signal when a run has done some steps: SIGINT to all processes of the terminal, as Ctrl-C does."""

    def do(walk: Walk, process: "subprocess.Popen[bytes]") -> None:
        walk.until(lambda: walk.steps_of(run) >= after or process.poll() is not None, f"step {after} of {run}")
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)

    return do


def visit(walk: Walk, process: "subprocess.Popen[bytes]") -> None:
    """Open the page in a browser, ask for images, take a picture; then Ctrl-C in the terminal."""
    from play_screenshot import open_page
    from playwright.sync_api import sync_playwright

    try:
        found = lambda: re.search(r"http://127\.0\.0\.1:\d+", walk.output)  # noqa: E731
        walk.until(lambda: found() or process.poll() is not None, "the address of the page")
        address = found()
        assert address
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1100, "height": 900})
            open_page(page, address[0])
            page.get_by_label("Prompt").fill("a handwritten digit three")
            page.get_by_role("button", name="Generate", exact=True).click()
            page.wait_for_function(
                "[...document.querySelectorAll('#scfm-images img')].filter(i => i.naturalWidth).length >= 3",
                timeout=120_000,
            )
            page.wait_for_timeout(500)
            page.screenshot(path=walk.folder / "play.png")
            browser.close()
    finally:
        os.killpg(process.pid, signal.SIGINT)


# What a person does by hand.


def make_images(walk: Walk) -> str:
    """60 images of digits' prototypes in every mode and size, a caption file each; the last one is cut off in the middle."""
    from PIL import Image, ImageDraw

    folder = walk.clone / "my_images"
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    kinds = [("RGB", "png"), ("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg"), ("I;16", "png"), ("RGB", "webp")]  # fmt: skip
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for number in range(60):
        mode, suffix = kinds[number % len(kinds)]
        size = draw.choice([(64, 64), (96, 64), (48, 80), (200, 120), (24, 24), (64, 128)])
        image = Image.new("RGB", size, "white" if number % 3 else "navy")
        ImageDraw.Draw(image).text((size[0] / 3, size[1] / 4), str(number % 10), fill="red", font_size=size[1] // 2)
        image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
        image.save(folder / f"{number:02d}.{suffix}")
        (folder / f"{number:02d}.txt").write_text(f"a handwritten digit {names[number % 10]}")
    whole = (folder / "59.png").read_bytes() if (folder / "59.png").exists() else b""
    path = folder / "59.png" if whole else next(folder.glob("59.[!t]*"))
    path.write_bytes(path.read_bytes()[:100])
    return (
        f"{len(list(folder.iterdir()))} files: 60 images of {len(kinds)} kinds, one of them broken, and their captions"
    )


def link_environment(walk: Walk) -> None:
    """The installation takes minutes and 8.8 GB; CI measures it. `make` compares two files of the clone with it."""
    (walk.clone / ".venv").symlink_to((ROOT / ".venv").resolve())
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(walk.clone / name, (0, 0))


def write_prompts(walk: Walk) -> None:
    (walk.clone / "prompts.txt").write_text("a handwritten digit one\na handwritten digit two\n")


def write_flux2(walk: Walk) -> None:
    import tiny_flux2

    tiny_flux2.write(walk.clone / "models" / "tiny_flux2")


def edit_site(walk: Walk) -> str:
    """The GPUs of the nodes are pretended, and so are their names."""
    lines = "SCFM_PROCESSES=1\nSCFM_RENDEZVOUS_HOST=127.0.0.1\n"
    with (walk.clone / "slurm" / "clusters" / "mine.env").open("a") as file:
        file.write(lines)
    return lines


@contextlib.contextmanager
def slurm(walk: Walk) -> Iterator[None]:
    """Two nodes on this machine; jobs of the partition `urgent` preempt those of `spot`."""
    from cluster import Cluster

    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as folder, Cluster(Path(folder), nodes=2) as cluster:
        walk.variables["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
        walk.service = cluster
        yield


def job_ends(walk: Walk) -> str:
    """Wait for the job that was submitted last; its output."""
    walk.until(lambda: job_state(walk)[1] in ENDED, "the end of the job")
    number, state = job_state(walk)
    output = (walk.clone / f"scfm-distill-{number}.out").read_text()
    if state != "COMPLETED":
        raise SystemExit(f"{output}\nthe walk ends: job {number} is {state}")
    return output


def job_state(walk: Walk) -> tuple[str, str]:
    """Number and state of the job that was submitted last."""
    number = re.findall(r"Submitted batch job (\d+)", walk.output)[-1]
    return number, walk.service.job(number)["JobState"]


def preempt(walk: Walk) -> str:
    """Somebody needs both nodes when a few steps are done."""
    walk.until(
        lambda: walk.steps_of("runs/flux2_klein_lora") >= 3 or job_state(walk)[1] in ENDED, "the third step of the job"
    )
    if job_state(walk)[1] not in ENDED:
        line = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "true")
        walk.service.wait(walk.service.sbatch(*line, cwd=walk.folder), ("COMPLETED",), LIMIT)
    output = job_ends(walk)
    if walk.service.job(job_state(walk)[0])["Restarts"] != "1":
        raise SystemExit(f"{output}\nthe walk ends: the job was not preempted")
    return output


@contextlib.contextmanager
def s3(walk: Walk) -> Iterator[None]:
    """A server that speaks S3's protocol; its address and keys are in the variables that docs/data.md names."""
    from storage import S3Server

    with S3Server() as server:
        walk.variables |= server.environment
        walk.service = server
        yield


def upload_shards(walk: Walk) -> str:
    """Tars as img2dataset writes them."""
    from PIL import Image

    files = sorted(path for path in (walk.clone / "my_images").glob("*.jpg"))
    for shard in range(4):
        with BytesIO() as buffer:
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                for number in range(8):
                    image, jpg = Image.open(files[(8 * shard + number) % len(files)]).convert("RGB"), BytesIO()
                    image.save(jpg, "jpeg")
                    text = f"a handwritten digit {('one', 'two')[number % 2]}"
                    about = json.dumps({"cogvlm_caption": text, "llava_caption": text})
                    for suffix, data in (("jpg", jpg.getvalue()), ("txt", text.encode()), ("json", about.encode())):
                        member = tarfile.TarInfo(f"{shard:05d}{number:04d}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, BytesIO(data))
            walk.service.upload_bytes(buffer.getvalue(), "mine", f"laion-pop/{shard:05d}.tar")
    return "s3://mine/laion-pop/00000.tar to 00003.tar, 8 images each"


def upload_manifest(walk: Walk) -> None:
    walk.service.upload_bytes((walk.clone / "manifest.json").read_bytes(), "mine", "laion-pop/manifest.json")


FAMILY = {
    "scfm_core/models/sd3_pag.py": '''\
"""Stable Diffusion 3 in the pipeline with perturbed-attention guidance. Made up: a family for a check of the guide."""

from typing import Any, ClassVar

from scfm_core.models.sd3 import SD3


class SD3Pag(SD3):
    """SD3 in another pipeline of diffusers."""

    pipelines = ("StableDiffusion3PAGPipeline",)
    known: ClassVar[dict[str, dict[str, Any]]] = {"made-up/sd3-pag": SD3.known["stabilityai/stable-diffusion-3.5-medium"]}

    def call_arguments(self, guidance: float, text_length: int) -> dict[str, Any]:
        """See `ModelFamily`."""
        return super().call_arguments(guidance, text_length) | {"pag_scale": 0.0}
''',
    "tests/families/tiny_sd3_pag.py": '''\
"""A tiny SD3 in the pipeline with perturbed-attention guidance."""

from pathlib import Path

import tiny_sd3

from recipes.tiny import write_pipeline


def write(folder: Path) -> None:
    """A complete pipeline."""
    write_pipeline(folder.parent / "for_its_vae", vae_steps=0)
    tiny_sd3.write(folder, vae=folder.parent / "for_its_vae" / "vae")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", "StableDiffusion3PAGPipeline"))
''',
}
"""A family that is as small as one can be: files, and below what is added to others."""
LINES = {
    "scfm_core/models/families.py": [
        ("import SD3\n", "import SD3\nfrom scfm_core.models.sd3_pag import SD3Pag\n"),
        ("Sana, Chroma)", "Sana, Chroma, SD3Pag)"),
    ],
    "tests/families/test_families.py": [
        ("CASES = {\n", 'CASES = {\n    "sd3_pag": Case(4.0, module="tiny_sd3_pag"),\n')
    ],
}


def add_family(walk: Walk) -> str:
    """Steps 2 and 3 of the guide."""
    for name, text in FAMILY.items():
        (walk.clone / name).write_text(text)
    for name, changes in LINES.items():
        text = (walk.clone / name).read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        (walk.clone / name).write_text(text)
    return ", ".join([*FAMILY, *LINES])


def remove_family(walk: Walk) -> None:
    for name in FAMILY:
        (walk.clone / name).unlink()
    subprocess.run(["git", "checkout", "--quiet", *LINES, "docs/models.md"], cwd=walk.clone, check=True)


START, DATA, EXPORT, CLUSTER = (f"docs/{name}.md" for name in ("getting_started", "data", "export", "cluster"))
TRAIN = "model.path=runs/demo/short_teacher train.steps=60 train.compile=false sample.every=30 checkpoint.every=20"
OWN = Step(START, "scfm train flux_dev_lora.yaml", TRAIN)
ENCODE = Step(
    START, "scfm data encode my_images -o data/flux_512 --model black-forest-labs/FLUX.1-dev",
    "--resolution 32 32 --text-length 8 --buckets auto data.bucket_step=8",
)  # fmt: skip
FEW = "model.path=runs/demo/short_teacher train.steps=5 train.compile=false train.global_batch_size=8 sample.every=0"
KLEIN = "flux2_klein_lora.yaml model.path=models/tiny_flux2 model.text_length=24 sample.every=0 train.compile=false train.global_batch_size=4 checkpoint.every=10 'sample.prompts=[a handwritten digit one]'"


def again(step: Step, **changes: Any) -> Step:
    """The same command, with other words or another end."""
    return Step(**{**vars(step), **changes})


PARTS = {
    "quickstart": Part(
        "README's quickstart",
        [
            Step("README.md", "git clone <this repository> scfm && cd scfm", where="."),
            Act("`.venv` is a link to an environment that `make setup` has built.", link_environment),
            Step(
                "README.md",
                "make demo",
                "DEMO='--vae-steps 60 --paths-per-prompt 5 train.steps=20 train.warmup_steps=0 train.global_batch_size=32 evaluate.samples=50'",
                says="trajectories",
            ),
        ],
    ),
    "own_images": Part(
        "An own folder of images",
        [
            Act("A folder of images as they come.", make_images),
            Step(
                DATA,
                "scfm data inspect my_images --buckets auto --model black-forest-labs/FLUX.1-dev",
                "--resolution 32 32 --text-length 8 data.bucket_step=8",
            ),
            again(ENCODE, code=2, says="max_bad_fraction"),
            again(ENCODE, tiny=f"{ENCODE.tiny} data.max_bad_fraction=0.02"),
            Step(DATA, "scfm data validate data/own", words={"data/own": "data/flux_512"}),
            Step(
                DATA,
                "scfm data inspect data/own --html sheet.html --model black-forest-labs/FLUX.1-dev",
                words={"data/own": "data/flux_512"},
            ),
        ],
    ),
    "training": Part(
        "A run, interrupted twice, and its export",
        [
            Step(START, "scfm train flux_dev_lora.yaml --dry-run", TRAIN),
            again(OWN, code=130, meanwhile=interrupt("runs/flux_dev_lora", signal.SIGINT, 12)),
            again(OWN, code=143, meanwhile=interrupt("runs/flux_dev_lora", signal.SIGTERM, 30)),
            OWN,
            Step(CLUSTER, "scfm status runs/flux_dev_lora"),
            Step(START, "scfm report runs/flux_dev_lora"),
            Step(
                START,
                'scfm sample runs/flux_dev_lora --steps 3 --prompt "a red fox in fresh snow"',
                words={"a red fox in fresh snow": "a handwritten digit three"},
            ),
            Step(EXPORT, "scfm export RUN", words={"RUN": "runs/flux_dev_lora"}),
            Step(EXPORT, "scfm export RUN --steps 4 --format comfyui", words={"RUN": "runs/flux_dev_lora"}),
        ],
    ),
    "play": Part("The page, in a browser", [Step("docs/play.md", "scfm play runs/flux_dev_lora", meanwhile=visit)]),
    "cluster": Part(
        "A cluster: ZeRO-3 on two nodes, preempted, then FSDP2 on one",
        [
            Act("A tiny FLUX.2 of the real classes, with random weights.", write_flux2),
            again(
                ENCODE,
                words={"data/flux_512": "data/flux2_klein_512", "runs/demo/short_teacher": "models/tiny_flux2"},
                tiny="--resolution 16 16 --text-length 24 data.max_bad_fraction=0.02",
            ),
            Step(CLUSTER, "cp slurm/clusters/example.env slurm/clusters/mine.env"),
            Act(
                "The site's file gets two lines: the GPUs of this cluster are pretended, and its nodes have no addresses.",
                edit_site,
            ),
            Step(
                CLUSTER,
                "SCFM_CLUSTER=mine sbatch slurm/distill_flux.sh",
                f"{KLEIN} engine.name=deepspeed engine.zero_stage=3 engine.shard=-1 train.steps=16",
                words={"SCFM_CLUSTER": "SCFM_HEALTH=0 SCFM_CLUSTER", "sbatch": "sbatch --partition=spot"},
            ),
            Act("A more urgent job takes both nodes while the run trains. Slurm requeues it, and it resumes.", preempt),
            Step(CLUSTER, "scfm status runs/flux_dev_lora", words={"flux_dev": "flux2_klein"}),
            Step(
                CLUSTER,
                "SCFM_CLUSTER=mine sbatch slurm/distill_flux.sh",
                f"{KLEIN} train.steps=20",
                words={"sbatch": "sbatch -N 1"},
            ),
            Act("One process goes on with FSDP2.", job_ends),
            Step(EXPORT, "scfm export RUN", words={"RUN": "runs/flux2_klein_lora"}),
        ],
        around=slurm,
    ),
    "storage": Part(
        "Data from S3; the recipe swapped by one argument",
        [
            Act("Shards of img2dataset in object storage.", upload_shards),
            Step(
                DATA,
                "scfm data index 's3://bucket/photos/{00000..00127}.tar' -o manifest.json",
                words={"bucket/photos": "mine/laion-pop"},
            ),
            Act("The manifest is put beside the shards.", upload_manifest),
            Step(
                START,
                "scfm train flux_dev_lora.yaml data=laion_pop.yaml data.sources.0.uri='s3://mine/laion-pop/{00000..00127}.tar'",
                f"{FEW} run.dir=runs/from_s3 data.resolution=[32,32] model.text_length=8 data.num_workers=1",
            ),
            Act("Two prompts.", write_prompts),
            Step(
                START,
                "scfm data generate prompts.txt -o data/self_generated --model black-forest-labs/FLUX.1-dev",
                "--resolution 32 32 --text-length 8 --per-prompt 8",
            ),
            Step(START, "scfm train flux_dev_lora.yaml data=self_generated.yaml", f"{FEW} run.dir=runs/self_generated"),
        ],
        around=s3,
    ),
    "pretrain": Part(
        "Pretraining with shortcut rows",
        [
            Step("docs/reproduce.md", "python -m recipes.demo --only teacher", words={"teacher": "assets"}),
            Step(
                "recipes/configs/tiny_pretrain_shortcut.yaml",
                "scfm train tiny_pretrain_shortcut.yaml",
                "train.steps=40 train.warmup_steps=0 sample.every=40 evaluate.samples=100",
            ),
            Step(START, "scfm evaluate runs/flux_dev_lora", words={"flux_dev_lora": "demo/pretrain_shortcut"}),
            Step(
                EXPORT,
                "scfm export RUN --steps 4 --merged FOLDER",
                words={"RUN --steps 4": "runs/demo/pretrain_shortcut", "FOLDER": "runs/demo/from_scratch"},
            ),
        ],
    ),
    "family": Part(
        "A new family, by CONTRIBUTING",
        [
            Act(
                "A made-up family: SD3's network in another pipeline of diffusers. Its files, and its lines in others:",
                add_family,
            ),
            Step("CONTRIBUTING.md", "python -m recipes.models_docs"),
            Step(
                "CONTRIBUTING.md",
                'python -m pytest tests/families -k "NAME or every_family or only_models"',
                "-q --no-header",
                words={"NAME": "sd3_pag"},
            ),
            Act("The family is taken back.", remove_family),
        ],
    ),
}


# The page.


def shortened(output: str, most: int = 9) -> str:
    """First and last lines of an output; of a line that was written over, what remained."""
    lines = [line[:170] + ("..." if len(line) > 170 else "") for line in re.sub(r"[^\n]*\r", "", output).splitlines()]
    lines = [line for line in lines if line.strip()]
    return "\n".join(lines if len(lines) <= most else [*lines[:3], "...", *lines[3 - most :]])


def transcript(part: Part, shown: list[dict[str, Any]]) -> str:
    """A chapter of the page."""
    texts = [f"## {part.title}\n"]
    for step, row in zip(part.steps, shown, strict=True):
        if isinstance(step, Act):
            texts.append(f"{step.text}\n" + (f"\n```text\n{shortened(row['output'])}\n```\n" if row["output"] else ""))
            continue
        name = os.path.relpath(step.page, "docs")
        times = f"{row['seconds']:.0f} s" + (f", exit code {row['code']}" if row["code"] else "")
        texts.append(f"`{step.command}` ([{Path(step.page).name}]({name}); {times})\n")
        texts.append(f"```console\n$ {row['typed']}\n{shortened(row['output'])}\n```\n")
    return "\n".join(texts)


def page(seen: dict[str, dict[str, Any]]) -> str:
    """docs/walk.md: what was seen of the parts that have been walked in a folder."""
    table = []
    for name, part in PARTS.items():
        if about := seen.get(name):
            rows = about["rows"]
            seconds, commands = sum(row["seconds"] for row in rows), sum("code" in row for row in rows)
            table.append(f"| {part.title} | {about['date']} | {commands} | {seconds:.0f} | {about['load']:.1f} |")
        else:
            table.append(f"| {part.title} | not walked | | | |")
    chapters = "\n".join(transcript(PARTS[name], about["rows"]) for name, about in seen.items())
    return f"""\
# The walk of a newcomer

In an empty folder with an empty home, commands copied from README and these pages, one after the other. `python tests/walk.py` types
them and writes this page from what it saw ([CONTRIBUTING](../CONTRIBUTING.md#the-walk)). Above each command is the one that stands on the
page; below it is what was typed: the models are tiny, so other models, sizes and numbers of steps take the place of the true ones.
Outputs are shortened. The environment is one that `make setup` had built before; CI measures the installation.

The seconds are of {os.cpu_count()} CPU cores, on which as many other processes waited to run, on average, as the last column says. Where a command
ends with an exit code, it was meant to: a broken image is refused, and a run is stopped by Ctrl-C and by SIGTERM.

| part | date | commands | seconds | other processes |
|---|---|---|---|---|
{chr(10).join(table)}

{chapters}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, help="default: a new one, which is removed")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page (default docs/walk.md)")
    arguments = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs, and theirs, would ignore Ctrl-C
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="walk"))
    walk = Walk(folder.resolve())
    for name in arguments.only:
        walk.walk(name)
    kept = {name: path for name in PARTS if (path := walk.folder / f"{name}.json").exists()}
    arguments.output.write_text(page({name: json.loads(path.read_text()) for name, path in kept.items()}))
    print(f"\n{arguments.output}")
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
