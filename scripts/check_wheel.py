"""Look into a built wheel: nothing that runs foreign bytes, every package there, small.

    python scripts/check_wheel.py dist/kvloom-*.whl

Refuses imports of pickle and its kin, ``torch.load``, bare ``eval``/``exec`` and ``assert`` in every Python file of the wheel, and
imports of Jinja outside the one renderer.
"""

from __future__ import annotations

import ast
import sys
import zipfile

BANNED_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BANNED_CALLS = {"torch.load", "numpy.load", "np.load", "os.system"}
BANNED_NAMES = {"eval", "exec", "compile", "__import__"}
TEMPLATE_RENDERER = "kvloom/text/template_process.py"
"""The only file that may import Jinja."""
PACKAGES = ("kvloom", "kvloom_models", "kvloom_quant", "kvloom_samplers", "kvloom_plugins", "kvloom_kernels")
MAX_CODE_BYTES = 1_000_000
DEMO_MODEL = "kvloom/demo/model/"
DEMO_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MAX_DEMO_BYTES = 6_200_000
"""Weights of at most 6,000,000 bytes, and the tokenizer."""


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an attribute chain, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def problems(name: str, source: str) -> list[str]:
    """Every banned thing in one file, as ``file:line: what``."""
    found = []
    banned = BANNED_MODULES if name == TEMPLATE_RENDERER else BANNED_MODULES | {"jinja2"}
    for node in ast.walk(ast.parse(source, name)):
        what = ""
        if isinstance(node, ast.Import):
            what = ", ".join(a.name for a in node.names if a.name.split(".")[0] in banned)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in banned:
            what = node.module
        elif isinstance(node, ast.Call):
            call = dotted(node.func)
            if call in BANNED_CALLS or call in BANNED_NAMES:
                what = f"{call}()"
        elif isinstance(node, ast.Assert):
            what = "assert"
        if what:
            found.append(f"{name}:{node.lineno}: {what}")  # type: ignore[attr-defined]  # every branch above has a line
    return found


def main(path: str) -> int:
    """Check one wheel; the exit code."""
    found = []
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        for name in names:
            if name.endswith(".py"):
                found += problems(name, wheel.read(name).decode())
        sizes = {i.filename: i.compress_size for i in wheel.infolist()}
    found += [f"package {p} is missing" for p in PACKAGES if f"{p}/__init__.py" not in names]
    found += [f"file {DEMO_MODEL}{file} is missing" for file in DEMO_FILES if DEMO_MODEL + file not in names]
    demo = sum(size for name, size in sizes.items() if name.startswith(DEMO_MODEL))
    code = sum(sizes.values()) - demo
    for what, size, most in (("demo model", demo, MAX_DEMO_BYTES), ("rest", code, MAX_CODE_BYTES)):
        if size > most:
            found.append(f"the {what} has {size} bytes, at most {most} are wanted")
    print("\n".join(found) or f"{path}: {len(names)} files, {code} bytes and a demo model of {demo} bytes, nothing banned")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
