"""What Triton kernels become for a GPU that is not here: registers, spills, shared memory, loops.

    python tests/ahead.py     a table of the sampler's kernels, for sm_90 and sm_80

To be run as a process of its own: kernels that were defined for the interpreter compile nothing."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.cuda.is_available = lambda: True  # so that model.py defines the kernels

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import model  # noqa: E402


class Built(NamedTuple):
    ttir: str
    ptx: str
    sass: str
    shared: int  # bytes
    registers: int  # of a thread
    spilled: int  # bytes stored and loaded


def build(kernel, types: dict, constants: dict, arch: int, aligned=(), **options) -> Built:
    """types: of the arguments that are not `constants`, fp32 pointers if not named; aligned:
    integers that are multiples of 16, as all pointers are."""
    names = kernel.arg_names
    types = {name: types.get(name, "*fp32") for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    places = [i for i, x in enumerate(names) if types[x][0] == "*" or x in aligned]
    attributes = {(i,): [["tt.divisibility", 16]] for i in places}
    source = ASTSource(kernel, types, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(made.asm["ptx"])
        compiler = get_ptxas(arch).path
        code = Path(folder, "kernel.cubin")
        gpu = f"--gpu-name=sm_{arch}{'a' if arch == 90 else ''}"
        command = [compiler, "-v", gpu, str(file), "-o", str(code)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [str(Path(compiler).with_name("cuobjdump")), "-sass", str(code)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", said))
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    return Built(made.asm["ttir"], made.asm["ptx"], sass, made.metadata.shared, registers, spilled)


def loops(sass: str) -> list[int]:
    """Instructions of each loop, the loops within it included."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    found = []
    for address, text in code:
        jump = re.search(r"BRA\S*\s+(?:\S+,\s*)?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < int(address, 16):  # of 16 bytes each
            found.append((int(address, 16) - int(jump[1], 16)) // 16 + 1)
    return found


STRIDES = "prompt_values prompt_question prompt_head prefix_values prefix_head".split()
STRIDES += "v_row own_values own_row own_head row_length".split()


def sampler_kernel(name: str, arch: int, dtype="bf16", K=128, greedy=False) -> Built:
    """A kernel of the sampler as the 1B model's batches call it."""
    halves = "q k v own prompt prefix out logits".split()
    types = dict.fromkeys(halves, "*" + dtype) | dict.fromkeys("R S vocab".split(), "i32")
    types |= dict.fromkeys("length group size token".split(), "*i64")
    types |= dict.fromkeys("scale inverse".split(), "fp32") | {"noise": "*fp64"}
    types |= dict.fromkeys(STRIDES, "i32")
    widths = dict(K=K, HEAD=max(16, triton.next_power_of_2(K)))
    draw = dict(GREEDY=greedy, STEPS=16, BLOCKS=model.BLOCKS_DRAW, BLOCK=model.BLOCK_DRAW)
    tile = model.TILE[2 if dtype == "bf16" else 4]
    constants, options = {
        "_shared_kernel": (widths | dict(ROWS=model.ROWS_SHARED, TILE=tile), {}),
        "_own_kernel": (widths | dict(SLOTS=model.SLOTS), dict(num_warps=2)),
        "_draw_kernel": (draw, dict(num_warps=8)),
    }[name]
    return build(getattr(model, name), types, constants, arch, STRIDES, **options)


KERNELS = ("_shared_kernel", "_own_kernel", "_draw_kernel")


def per_key(own: Built) -> float:
    """Instructions of its two warps for a key and a value."""
    return 2 * loops(own.sass)[0] / model.SLOTS


def check():
    """What tests/test_decode_kernels.py asks for."""
    for dtype in ("bf16", "fp32"):
        for arch, memory in ((90, 227), (80, 163)):
            for name in KERNELS:
                made = sampler_kernel(name, arch, dtype)
                where = f"{name} {dtype} sm_{arch}"
                assert made.spilled == 0, f"{where}: registers spill to memory"
                assert made.shared <= memory * 1024, f"{where}: more memory than an SM has"
                assert "tf32" not in made.ptx, f"{where}: a product of fp32 is rounded to tf32"
                assert "atomic" not in made.ttir, f"{where}: sums in any order"
                if dtype == "fp32":
                    continue
                if name == "_shared_kernel":
                    assert "mma.sync" in made.ptx, "the tensor cores lie idle"
                if name == "_own_kernel":
                    copies = re.findall(r"cp\.async\.cg\.shared\.global .*0x10,", made.ptx)
                    assert len(copies) >= 16, "keys and values in loads of 2 bytes"
                    assert per_key(made) < 60, "more instructions a key than memory has time for"
                if name == "_draw_kernel":
                    assert made.ptx.count("ld.global.v4") >= 4, "loads of 2 bytes"
                    assert sampler_kernel(name, arch, dtype, greedy=True).spilled == 0


def main():
    print("kernel         dtype  sm  registers  spilled  shared  instructions of its loops")
    for dtype in ("bf16", "fp32"):
        for name in KERNELS:
            for arch in (90, 80):
                made = sampler_kernel(name, arch, dtype)
                told = f"{made.registers:11}{made.spilled:9}{made.shared:8}  {loops(made.sass)}"
                if name == "_own_kernel":
                    told += f", {per_key(made):.0f} a key"
                print(f"{name:15}{dtype:5}{arch:4}{told}")


if __name__ == "__main__":
    check() if sys.argv[1:] == ["check"] else main()
