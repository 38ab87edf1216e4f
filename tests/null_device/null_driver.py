"""The null device: a CUDA driver that does nothing (driver.c), preloaded under torch's own CUDA code.

`build()` compiles it into a cache folder, `environment()` is what a process needs to start on it, and `Device` counts in such a process.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_LIBRARY = "libcuda.so.1"
_TORCH_LIBRARIES = (
    "libc10_cuda.so",
    "libtorch_cuda.so",
    "libtorch_cuda_linalg.so",
    "libtorch_python.so",
    "libcaffe2_nvrtc.so",
)
_PRODUCT = re.compile("gemm|Gemm|gemv|dot|Dot|trsm|LtMatmul$")
"""Names of the functions of cuBLAS that launch kernels in this project."""


def _folder(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _headers() -> list[Path]:
    """NVIDIA's headers, from the wheels that torch and Triton install."""
    parts = {"nvidia.cublas": "include", "nvidia.cuda_runtime": "include", "triton": "backends/nvidia/include"}
    return [folder / below for package, below in parts.items() if (folder := _folder(package)) is not None]


def why_unavailable() -> str | None:
    """Why the null device cannot run here; None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the null device is for Linux on x86-64"
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            return f"the null device needs {tool}"
    import torch

    if not (torch.version.cuda or "").startswith("12."):
        return f"the null device has the interface of CUDA 12, this torch has CUDA {torch.version.cuda}"
    if len(_headers()) < 3:
        return "the null device needs the headers of CUDA, cuBLAS and Triton, which torch's wheels install"
    return None


def why_no_triton() -> str | None:
    """Why Triton cannot compile its launchers here; None if it can. Everything else runs without."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.is_file() else f"Triton compiles its launchers, which needs {header}"


def build() -> Path:
    """The folder with the driver, compiled if this torch has none yet.

    Raises:
        CalledProcessError: if gcc does; its message is on standard error.
    """
    import torch

    sources = b"".join((HERE / name).read_bytes() for name in ("driver.c", "null_driver.py"))
    key = hashlib.sha256(sources + f"{torch.__version__} {sys.version}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scfm_null_device"
    folder = cache / key
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as made:
            _compile(Path(made))
            with contextlib.suppress(OSError):  # another process was faster
                Path(made).rename(folder)
                Path(made).mkdir()  # the context removes it
    return folder


def _compile(folder: Path) -> None:
    """Driver, and stubs of every function of CUDA and cuBLAS that this torch calls and driver.c lacks."""
    source = (HERE / "driver.c").read_text()
    torch_folder = _folder("torch")
    assert torch_folder is not None
    libraries = [path for name in _TORCH_LIBRARIES if (path := torch_folder / "lib" / name).is_file()]
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", *libraries], capture_output=True, text=True, check=True
    ).stdout
    wanted = set(re.findall(r" U ((?:__cuda|cuda|cu|cublas)[A-Z]\w*)", listed))
    lines = ["void null_product(void);", "void null_missing(const char *);"]
    for name in sorted(wanted):
        if re.search(rf"\b{name}\(", source) or name.startswith("cuFile") or name == "cudaGetDeviceProperties_v2":
            continue
        if name.startswith("cublas"):
            body = "null_product(); return 0;" if _PRODUCT.search(name) else "return 0;"
        else:
            body = f'null_missing("{name}"); return 0;'
        lines.append(f"int {name}(void) {{ {body} }}")
    (folder / "stubs.c").write_text("\n".join(lines) + "\n")
    include = [f"-I{path}" for path in _headers()]
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", *include, HERE / "driver.c", folder / "stubs.c"]
    subprocess.run([*command, "-o", folder / _LIBRARY, "-lpthread", "-ldl"], check=True)
    # cuDNN asks the true driver. Python imports this file at its start, in child processes too.
    (folder / "sitecustomize.py").write_text(_WITHOUT_CUDNN)


_WITHOUT_CUDNN = '''\
"""Without cuDNN: PyTorch's own convolutions run on the null device, cuDNN's do not."""
import importlib.abc
import importlib.util
import sys


class _AfterTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        execute = spec.loader.exec_module

        def then(module):
            execute(module)
            module.backends.cudnn.enabled = False
            module.backends.cuda.enable_cudnn_sdp(False)

        spec.loader.exec_module = then
        return spec


sys.meta_path.insert(0, _AfterTorch())
'''


def environment(*, card: str = "a100", cards: int = 1, memory: float | None = None) -> dict[str, str]:
    """The environment of a process that starts on the null device.

    Args:
        card: `a100` or `h100`, both with 80 GB.
        cards: their number.
        memory: GiB of a card instead of its own; a peak of any size is measured on a card that holds it.
    """
    folder = build()
    values = dict(os.environ) | {
        "LD_PRELOAD": str(folder / _LIBRARY),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH")))),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH")))),
        "NULL_DEVICE_CARD": card,
        "NULL_DEVICE_COUNT": str(cards),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),  # what this "GPU" measures stays out of the user's cache
        "HF_HUB_OFFLINE": "1",
    }
    values.pop("TRITON_INTERPRET", None)
    if memory is not None:
        values["NULL_DEVICE_BYTES"] = str(round(memory * 2**30))
    return values


class Counters(ctypes.Structure):
    """`struct counters` of driver.c, where the fields are explained."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("launches", "products", "graph_nodes", "copies", "pageable", "waits")),
        ("held", ctypes.c_size_t),
        ("most", ctypes.c_size_t),
    )

    def values(self) -> dict[str, int]:
        return {name: getattr(self, name) for name, *_ in self._fields_}


class Device:
    """What the driver of this process counts."""

    def __init__(self) -> None:
        if _LIBRARY not in os.environ.get("LD_PRELOAD", ""):
            raise RuntimeError("this process does not run on the null device: start it with null_driver.environment()")
        self._library = ctypes.CDLL(_LIBRARY)
        self.counters = Counters.in_dll(self._library, "null_counters")

    def kernels(self) -> Counter[str]:
        """Launches since the start, by a short name of the kernel; products of cuBLAS are not among them."""
        at, name, count = ctypes.c_long(0), ctypes.c_char_p(), ctypes.c_long()
        found: Counter[str] = Counter()
        while self._library.null_kernel(ctypes.byref(at), ctypes.byref(name), ctypes.byref(count)):
            found[short_name((name.value or b"?").decode())] += count.value
        return found

    @contextlib.contextmanager
    def waits(self) -> Iterator[Counter[str]]:
        """Within `with`, the calls in which the host waits for the device, and the copies of memory that is not pinned: by line."""
        seen: Counter[str] = Counter()
        here = threading.get_ident()

        @ctypes.CFUNCTYPE(None, ctypes.c_char_p)
        def note(call: bytes) -> None:
            place = _place(sys._getframe(1)) if threading.get_ident() == here else "a thread of autograd"
            seen[f"{call.decode()} at {place}"] += 1

        pointer = ctypes.c_void_p.in_dll(self._library, "null_on_wait")
        pointer.value = ctypes.cast(note, ctypes.c_void_p).value
        try:
            yield seen
        finally:
            pointer.value = None


_GENERIC = re.compile(
    r"void|bool|at|native|c10|std|cutlass|pytorch_flash|anonymous|namespace|unnamed|type|array|memory|binary_internal|templates|cuda|\d.*"
    r"|\w*elementwise_kernel|\w*reduce_kernel|gpu_kernel_impl\w*|func_wrapper_t|ReduceOp|multi_tensor_apply_kernel|TensorListMetadata"
    r"|FusedOptimizerTensorListMetadata|[AB]?UnaryFunctor|BinaryFunctor|float|double|int|long|char|unsigned|BFloat16|Half"
)
"""Words that PyTorch's names of kernels have in common."""


@functools.cache
def short_name(mangled: str) -> str:
    """The telling word of a kernel's name: the function that PyTorch's generic kernels are made for; Triton's without numbers."""
    if not mangled.startswith("_Z"):
        return re.sub(r"(_\d+)+$", "", mangled)
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_char_p
    name = (library.__cxa_demangle(mangled.encode(), None, None, None) or mangled.encode()).decode()
    words = re.findall(r"\w+", name)
    return next((word for word in words if not _GENERIC.fullmatch(word)), words[0])[:60]


def _place(frame: Any) -> str:
    """The innermost line of this project on the stack, and the line of a library in which it waits."""
    while frame is not None and _is_between(frame.f_code.co_filename):
        frame = frame.f_back
    inner = frame
    while frame is not None and not _is_ours(Path(frame.f_code.co_filename)):
        frame = frame.f_back
    lines = [] if frame is None else [f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"]
    if inner is not None and inner is not frame:
        lines.append(f"{inner.f_code.co_filename.rpartition('site-packages' + os.sep)[2]}:{inner.f_lineno}")
    return " via ".join(lines) or "?"


def _is_between(file: str) -> bool:
    return f"{os.sep}torch{os.sep}" in file or Path(file).is_relative_to(HERE)


def _is_ours(path: Path) -> bool:
    return path.is_relative_to(ROOT) and ".venv" not in path.parts
