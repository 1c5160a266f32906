"""CUDA C++ to machine code with no GPU: by NVRTC, as PyTorch's wheels bring it or the system has it, or by nvcc."""

import ctypes
import ctypes.util
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

from fastidc.errors import FastidcError


@functools.cache
def library() -> ctypes.CDLL | None:
    """NVRTC, or None where there is none."""
    found = (path for entry in sys.path for path in sorted(Path(entry).glob("nvidia/*/lib/libnvrtc.so.*")))
    for name in (*found, "libnvrtc.so.13", "libnvrtc.so.12", ctypes.util.find_library("nvrtc")):
        try:
            return ctypes.CDLL(str(name)) if name else None
        except OSError:
            continue
    return None


def version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def cubin(source: str, options: tuple[str, ...]) -> bytes:
    """``source`` compiled with ``options``, of which one is ``-arch=sm_NN``; FastidcError with the compiler's first complaint."""
    nvrtc, program = library(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            lines = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode().strip().splitlines()
            raise FastidcError(next((line for line in lines if "error" in line), lines[0] if lines else "NVRTC says nothing"))
        return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def cubin_of_nvcc(nvcc: str, source: str, options: tuple[str, ...]) -> bytes:
    """As `cubin`, by the compiler at ``nvcc``."""
    with tempfile.TemporaryDirectory() as folder:
        code, out = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        code.write_text(source)
        done = subprocess.run([nvcc, *options, "-cubin", "-o", str(out), str(code)], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise FastidcError(next((line for line in lines if "error" in line), lines[0] if lines else "nvcc says nothing"))
        return out.read_bytes()


def _text(size_of, read, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw
