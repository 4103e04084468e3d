"""Compile every Triton kernel for sm_80, sm_90 and sm_100, without a GPU, and print what each one
takes.

    python tests/kernels/compile_cuda.py [--all] [--capability 90] [--kernel tree_attention]

Without --all, as in the test, every kernel is compiled for each of the three, and every
specialisation for one of them: a kernel's specialisations take turns.

What is compiled is in specialisations.py. The process must not run Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import aurora_kernels
import torch
import triton
from specialisations import SPECIALISATIONS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

CAPABILITIES = ((8, 0), (9, 0), (10, 0))
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
torch.float64: "*fp64",
           torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8",
           torch.uint8: "*u8",
           torch.bool: "*i1"}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]
COLUMNS = (
    "capability",
    "file",
    "specialisation",
    "registers",
    "stack_bytes",
    "shared_bytes",
    "warps",
    "stages",
)


def name_of(module) -> str:
    return module.__name__.rpartition(".")[2]


def modules() -> list:
    """Every file of the package that holds Triton kernels."""
    names = sorted(p.stem for folder in aurora_kernels.__path__ for p in Path(folder).glob("*.py"))
    found = [importlib.import_module(f"aurora_kernels.{name}") for name in names]
    return [module for module in found if kernels_of(module) or name_of(module) in SPECIALISATIONS]


def kernels_of(module) -> set[str]:
    """Names of the kernels that a file defines; device functions that they call have other
    names.
    """
    return {
        name
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
        and name.endswith("_kernel")
        and value.fn.__module__ == module.__name__
    }


def specialise(kernel: JITFunction, arguments: dict, constexprs: dict) -> ASTSource:
    """What Triton would compile for this call.

    Raises ValueError if a parameter is missing or unknown.
    """
    given = {**arguments, **constexprs}
    names = [p.name for p in kernel.params]
    if set(names) != set(given):
        raise ValueError(
            f"{kernel.__name__}: missing {set(names) - set(given)}, unknown"
            f" {set(given) - set(names)}"
        )
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(kernel.params):
        value = given[p.name]
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if p.is_constexpr or value is None or (is_int and value == 1 and not p.do_not_specialize):
            signature[p.name], constants[p.name] = "constexpr", value
            continue
        signature[p.name], aligned = _type_of(value)
        if aligned and not (p.do_not_specialize or p.do_not_specialize_on_alignment):
            attributes[i,] = ALIGNED
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _type_of(value) -> tuple[str, bool]:
    """(Triton's type, known to be divisible by 16) of an argument."""
    if isinstance(value, str):
        name, _, aligned = value.partition(":")
        return name, name.startswith("*") or aligned == "16"
    if isinstance(value, torch.Tensor):
        return POINTER[value.dtype], True
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    return "fp32", False


def compile_one(file: str, name: str, capability: tuple[int, int]) -> dict:
    """One row of the table."""
    kernel, arguments, constexprs, options = next(
        s[1:] for s in SPECIALISATIONS[file](capability) if s[0] == name
    )
    source = specialise(kernel, arguments, constexprs)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    compiled = triton.compile(source, target=target, options=options)
    registers, stack = resources(compiled.asm["cubin"])
    return {
        "capability": 10 * capability[0] + capability[1],
        "file": file,
        "specialisation": name,
        "kernel": kernel.__name__,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
    }


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack, where spilled registers go) of a compiled
    kernel.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    if not found:
        raise ValueError(f"cuobjdump: expected a line with REG and STACK, got {out!r}")
    return int(found[1]), int(found[2])


def listed(module, capability: tuple[int, int], everything: bool) -> Iterator[str]:
    """Names of the specialisations of a file that are compiled for a capability."""
    of_kernel: dict[str, list[str]] = {}
    for name, kernel, *_ in SPECIALISATIONS[name_of(module)](capability):
        of_kernel.setdefault(kernel.__name__, []).append(name)
    for names in of_kernel.values():
        turn = CAPABILITIES.index(capability) % len(names)
        yield from names if everything else names[turn :: len(CAPABILITIES)]


def table(capabilities=CAPABILITIES, kernel: str = "", everything: bool = False) -> Iterator[dict]:
    """A row per specialisation, compiled on as many cores as there are."""
    work = [
        (name_of(module), name, capability)
        for module in modules()
        for capability in capabilities
        for name in listed(module, capability, everything)
        if kernel in module.__name__
    ]
    assert len(work) == len(set(work)), "names of specialisations are unique in their file"
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_one, *zip(*work))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, choices=[80, 90, 100])
    parser.add_argument("--kernel", default="", help="only files whose name contains this")
    parser.add_argument(
        "--all", action="store_true", help="every specialisation for every capability: minutes"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON per row")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: expected a process that compiles; unset it")
    wanted = [c for c in CAPABILITIES if args.capability in (None, 10 * c[0] + c[1])]
    layout = "{:>10} {:<16} {:<44} {:>9} {:>11} {:>12} {:>5} {:>6}"
    if not args.json:
        print(f"triton {triton.__version__}", layout.format(*COLUMNS), sep="\n")
    rows = []
    for row in table(wanted, args.kernel, args.all):
        rows.append(row)
        print(
            json.dumps(row) if args.json else layout.format(*(row[c] for c in COLUMNS)), flush=True
        )
    if not args.json:
        print(f"{len(rows)} specialisations")


if __name__ == "__main__":
    main()
